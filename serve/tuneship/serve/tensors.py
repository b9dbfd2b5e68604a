"""Headers of safetensors files, read without torch and without the weights.

Format: 8 bytes little-endian length, that many bytes of JSON, then the data that the JSON's offsets cover without gaps
(https://github.com/huggingface/safetensors#format). The library checks all of that when it opens a file, so we ask it.
"""

from __future__ import annotations

from pathlib import Path

from tuneship.core.errors import ArtifactError


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """{key: shape} of every tensor in `file`.

    Raises:
        ArtifactError: not a safetensors file, or cut short.

    """
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - not for `--help`

    try:
        with safe_open(file, framework="numpy") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{file} cannot be read ({error}): truncated, or not safetensors", hint="copy or download it again"
        ) from None
