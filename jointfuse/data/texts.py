"""The text of a sample, which is its last member, from no more of its bytes than that."""

import tarfile


def most_bytes_of(characters: int) -> int:
    """The most that a text of so many characters takes in a tar, its header included."""
    return tarfile.BLOCKSIZE * (1 + -(-4 * characters // tarfile.BLOCKSIZE))


def last_text(data: bytes, characters: int) -> str | None:
    """The text of so many characters that is the last member of a sample, from the sample's last bytes; None where
    these do not end in such a member."""
    for begin in range(len(data) - 2 * tarfile.BLOCKSIZE, -1, -tarfile.BLOCKSIZE):
        try:
            header = tarfile.TarInfo.frombuf(data[begin : begin + tarfile.BLOCKSIZE], "ascii", "replace")
            content = data[begin + tarfile.BLOCKSIZE :]
            if header.isreg() and 0 <= len(content) - header.size < tarfile.BLOCKSIZE:
                text = content[: header.size].decode()
                # A text may hold what looks like a header, and then ends in a shorter one.
                if len(text) == characters and header.name.endswith(".txt"):
                    return text
        except (tarfile.HeaderError, UnicodeDecodeError):
            continue
    return None
