"""However the bytes are cut, the events are the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneship.bench.load.sse import Event, SseParser

_LINE = st.sampled_from(
    ['data: {"a": 1}', "data:x", "data", "data: ", "data:  two", ": comment", "event: error", "id: 7", "retry: 5", "",
     "", "", "data: \u00fcml\u00e4ut \u2713 \U0001f600", "nonsense", "data: a:b"]
)  # fmt: skip
_STREAM = st.lists(st.tuples(_LINE, st.sampled_from(["\n", "\r\n", "\r"])), max_size=30).map(
    lambda lines: "".join(line + end for line, end in lines).encode()
)


def _parse(*chunks: bytes) -> list[Event]:
    parser = SseParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


def _reference(stream: bytes) -> list[Event]:
    """The specification's algorithm on a stream that is there whole: normalise line ends, then go line by line."""
    lines = stream.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")[:-1]
    events, data, kind = [], [], ""
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                events.append(Event(kind or "message", "\n".join(data).encode()))
            data, kind = [], ""
        elif name == "data":
            data.append(value)
        elif name == "event":
            kind = value
    return events


@given(_STREAM, st.data())
def test_any_split_gives_the_same_events(stream: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    # A stream that ends in "\r" may go on with "\n": one more byte tells that it does not.
    assert _parse(*chunks, b"x") == _reference(stream)


@given(_STREAM)
def test_byte_by_byte_equals_at_once(stream: bytes) -> None:
    assert _parse(*(bytes([byte]) for byte in stream)) == _parse(stream)


@pytest.mark.parametrize(
    ("chunks", "events"),
    [
        ([b"data: 1\n\ndata: 2\n\n"], [("message", b"1"), ("message", b"2")]),
        ([b"data: 1\r", b"\n\r", b"\ndata: 2\r\n\r\n"], [("message", b"1"), ("message", b"2")]),
        ([b"\xef", b"\xbb\xbfdata: after the mark\n\n"], [("message", b"after the mark")]),
        ([b"data: first\ndata: second\n\n"], [("message", b"first\nsecond")]),
        ([b": ping\n\n", b"event: error\ndata: {}\n\n"], [("error", b"{}")]),
        ([b"data: cut off"], []),
        ([b"", b"data: x\n", b"", b"\n"], [("message", b"x")]),
    ],
)
def test_examples(chunks: list[bytes], events: list[tuple[str, bytes]]) -> None:
    assert _parse(*chunks) == events
