"""Write a transcript in the forms of OpenAI's protocol: json, text, verbose_json, srt, vtt."""

from starlette.responses import JSONResponse, PlainTextResponse, Response

from .protocol import TranscriptionRequest
from .subtitles import Segment, as_srt, as_vtt, segments_of
from .transcription import Transcript

# The code of ISO 639 for a language that nobody has told.
UNDETERMINED = "und"


def needs_words(request: TranscriptionRequest) -> bool:
    """Return whether a response must tell when words are said."""
    return request.response_format in ("srt", "vtt", "verbose_json")


def write(transcript: Transcript, request: TranscriptionRequest, duration_s: float) -> Response:
    """Return the response to a request for a transcript.

    Args:
        duration_s (`float`): of the recording.
    """
    form, text = request.response_format, transcript.text
    if form == "json":
        counts = {"input_tokens": transcript.num_prompt_tokens, "output_tokens": transcript.num_answer_tokens}
        usage = {"type": "tokens", **counts, "total_tokens": sum(counts.values())}
        return JSONResponse({"text": text, "usage": usage})
    if form == "text":
        return PlainTextResponse(f"{text}\n")
    words = transcript.words or []
    segments = segments_of(words)
    if form == "srt":
        return PlainTextResponse(as_srt(segments), media_type="application/x-subrip")
    if form == "vtt":
        return PlainTextResponse(as_vtt(segments), media_type="text/vtt")
    verbose = {"task": "transcribe", "language": UNDETERMINED, "duration": duration_s, "text": text}
    wanted = request.timestamp_granularities or ["segment"]
    if "word" in wanted:
        verbose["words"] = [
            {"word": word["text"].strip(), "start": word["timestamp"][0], "end": word["timestamp"][1]} for word in words
        ]
    if "segment" in wanted:
        verbose["segments"] = [_segment(number, each, request) for number, each in enumerate(segments)]
    return JSONResponse({**verbose, "usage": {"type": "duration", "seconds": round(duration_s)}})


def _segment(number: int, segment: Segment, request: TranscriptionRequest) -> dict:
    return {
        "id": number,
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "temperature": request.temperature,
    }
