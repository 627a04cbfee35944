"""What no family takes as a message, and token ids and bytes as plain Python has them."""

from __future__ import annotations


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level BPE vocabulary stands for (the table GPT-2's tokenizer introduced):
    printable Latin-1 characters are themselves, the other bytes follow from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def as_list(ids) -> list[int]:
    """A tensor on any device, an array or a sequence of ids as a list."""
    return ids.tolist() if hasattr(ids, "tolist") else list(ids)


def check_messages(messages: list[dict], who: str) -> None:
    """ValueError, naming `who`, for messages no family takes: video, images in assistant turns, unknown content."""
    if not messages:
        raise ValueError(f"{who}: no messages")
    for message in messages:
        content = message["content"]
        for part in [] if isinstance(content, str) else content:
            kind = part.get("type")
            if kind == "video" or "video" in part:
                raise ValueError(f"{who}: video content is not supported; pass single images")
            if kind == "image" and message["role"] == "assistant":
                raise ValueError(
                    f"{who}: an image in an assistant turn is not supported; images belong to the user's turn"
                )
            if kind not in ("image", "text"):
                raise ValueError(f'{who}: content of type {kind!r}; only "text" and "image" are supported')
