"""What Prometheus reads at /metrics: requests, the clips that wait, the batches, and the time in encoder and engine."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one front, in a registry of its own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        own = {"namespace": "blsp_kd", "registry": self.registry}
        seconds = {**own, "buckets": SECONDS}
        self.requests = Counter("requests", "Answered requests.", ["route", "status"], **own)
        self.requests_running = Gauge("requests_running", "Requests that are being answered.", **own)
        self.waiting_clips = Gauge("waiting_clips", "New clips that are decoded, wait, or are encoded.", **own)
        self.cache_lookups = Counter("cache_lookups", "Clips looked up in the cache.", ["result"], **own)
        self.batch_size = Histogram("batch_size", "Clips encoded at once.", buckets=(1, 2, 4, 8, 16, 32, 64), **own)
        self.encoder_wait_s = Histogram("encoder_wait_seconds", "How long a clip waited to be encoded.", **seconds)
        self.encoder_s = Histogram("encoder_seconds", "How long encoder and adapter took for a batch.", **seconds)
        self.engine_first_byte_s = Histogram(
            "engine_first_byte_seconds", "From a request to the engine to the first byte of its answer.", **seconds
        )
        self.engine_s = Histogram("engine_seconds", "From a request to the engine to the end of its answer.", **seconds)
        self.sessions = Gauge("realtime_sessions", "Realtime sessions that are open.", **own)
        self.session_s = Histogram("realtime_session_seconds", "How long a realtime session was open.", **seconds)
        self.read_ahead = Counter(
            "realtime_read_ahead", "Requests that had the engine read on while one spoke.", ["status"], **own
        )
        self.first_delta_s = Histogram(
            "realtime_first_delta_seconds", "From the creation of a realtime response to its first text.", **seconds
        )
        self.cancelled = Counter("cancelled_requests", "Requests whose client went away.", **own)

    def render(self) -> bytes:
        """Return the metrics in the text format of Prometheus."""
        return generate_latest(self.registry)
