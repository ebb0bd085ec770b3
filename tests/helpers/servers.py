"""Servers in processes of their own, on loopback: the front, `transformers serve`, and the stand-in for vLLM.

Each may be ended and started again at the same address. Leaves out: the real vLLM (`real_engine.py`).
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 900
END_TIMEOUT_S = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A process that serves HTTP on loopback.

    Args:
        command: to which `--host` and `--port` are added.
        log: file for what it prints; it is appended to.
        settings: of its environment, beside this process's own.
    """

    def __init__(self, command: list, log: Path, **settings):
        port = free_port()
        self.url, self.log = f"http://127.0.0.1:{port}", log
        self.command = [*map(str, command), "--host", "127.0.0.1", "--port", str(port)]
        self.settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **settings}
        self.start()

    def start(self):
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=self.settings,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_ready(self, route: str = "/health"):
        """Wait until a route answers with status 200, and return this server.

        Raises:
            RuntimeError: the process has ended, or it took too long.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}{route}", timeout=5):
                    return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise RuntimeError(f"It did not start (exit code {self.process.poll()}):\n{self.log.read_text()[-5000:]}")

    def stop(self) -> int:
        """End it by SIGTERM, or by force after a minute, and return its exit code."""
        self.process.terminate()
        try:
            return self.process.wait(timeout=END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        """End it and all processes that it has started by SIGKILL, and return its exit code."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


def start_front(model: Path, engine: Server, log: Path, *options, **settings) -> Server:
    """Start a front for the model of a folder.

    Args:
        options, settings: of the command line, and of the environment.
    """
    command = [sys.executable, "-m", "processing.serving", model, "--engine", f"{engine.url}/v1", *options]
    return Server(command, log, **settings)


def start_stand_in(options: list, log: Path) -> Server:
    """Start the stand-in engine with arguments of `vllm serve`, as far as it has them."""
    return Server([sys.executable, "-m", "tests.helpers.stand_in_engine", *options], log)


def start_transformers_serve(model: Path, log: Path) -> Server:
    """Start transformers' own server, as docs/serving.md does."""
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", model]
    return Server([*command, "--trust-remote-code", "--device", "cpu"], log)
