"""GPT-2's encoding, r50k_base, from tiktoken's own cache or download, or from a file."""

import base64
import hashlib
from pathlib import Path

from tiktoken.load import read_file_cached
from tiktoken_ext.openai_public import r50k_pat_str

from manta.errors import DataError
from manta.text.tokenizer import R50K, Tokenizer

# sha256 of r50k_base.tiktoken, as tiktoken 0.14 checks it (tiktoken_ext/openai_public.py).
R50K_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


def named(name: str, file: str | None = None) -> Tokenizer:
    """Loads r50k_base, GPT-2's encoding, from tiktoken's own cache or download, or from a file.

    Raises:
        DataError: the file is missing or is another file, or the download failed.
    """
    assert name == R50K, name
    if file is not None:
        data = _read_encoding_file(file)
    else:
        address = _r50k_address()
        try:
            data = read_file_cached(address, R50K_SHA256)
        except Exception as e:  # requests' and the operating system's errors alike
            raise DataError(
                f"{name} is downloaded on first use, and that failed ({type(e).__name__}); "
                f"get the file {name}.tiktoken on a machine with network and give it with "
                f"data.tokenizer_file=PATH/{name}.tiktoken"
            ) from None
    ranks = {}
    for line in data.splitlines():
        token, _, rank = line.partition(b" ")
        ranks[base64.b64decode(token)] = int(rank)
    return Tokenizer(name, r50k_pat_str, ranks, eot=len(ranks))


def _read_encoding_file(file: str) -> bytes:
    path = Path(file).expanduser()
    if not path.is_file():
        raise DataError(f"data.tokenizer_file={file}: no such file")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != R50K_SHA256:
        raise DataError(
            f"data.tokenizer_file={file}: not r50k_base.tiktoken (its sha256 is {found[:16]}..., "
            f"expected {R50K_SHA256[:16]}...)"
        )
    return data


def _r50k_address() -> str:
    """The address of tiktoken's file, read from tiktoken itself so that both share one cache."""
    from tiktoken_ext import openai_public

    constants = openai_public.r50k_base.__code__.co_consts
    return next(c for c in constants if isinstance(c, str) and c.endswith(f"{R50K}.tiktoken"))
