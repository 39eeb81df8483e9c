"""A folder that plain transformers opens. It is opened and compared before it is in its place.

transformers is an extra: `pip install 'manta[export]'`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from manta import foreign
from manta.errors import CheckpointError, ConfigError, DataError
from manta.export import special_tokens, weights
from manta.export.special_tokens import write_json
from manta.model.gpt import GPT
from manta.model.shape import ModelConfig
from manta.terminal import named
from manta.text import tokenizer_json
from manta.text.tokenizer import Tokenizer
from manta.text.tokenizer_extras import END_OF_TEXT
from manta.train.checkpoints import tensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOLERANCE = 1e-4  # of a logit, fp32
COMPARED_TOKENS = 256  # in each of two sequences: with 150,000 ids, their logits take 0.6 GB

# Texts that tokenizers are most likely to get wrong.
ADVERSARIAL = [
    "",
    END_OF_TEXT,
    f"before{END_OF_TEXT}after {END_OF_TEXT}\n",
    "emoji 🐟🐠🦈 and a family 👨‍👩‍👧‍👦, flags 🇫🇷",
    " " * 300 + "word" + " " * 50,
    "\t\t\n\n\r\n \n  \n\u00a0\u2003\u3000x\u200b",
    "don't we'll it's I'VE 'S 's",
    "naïve Ångström ｆｕｌｌ ﬁ Ω≈ç√ e\u0301",
    "日本語のテキスト 한국어 العربية עברית हिन्दी",
    "1234567890 3.14159 0x1F 1,000,000",
    "\x00\x01\x7f\ufffd\ufeff",
    "a" * 1000,
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}  # comment\n",
    "half a pair \ud83d and the other \udc1f alone",
]


def write(folder: Path, model: GPT, tokenizer: Tokenizer, card: str) -> None:
    """Writes weights, config, tokenizer and model card to an existing folder.

    Raises:
        CheckpointError: transformers has no such model.
    """
    c = model.config
    if weights.model_type(c) == "llama" and c.n_embd % c.n_head:
        raise CheckpointError(
            f"to=hf: transformers' Llama has no model.n_embd={c.n_embd} with model.n_head="
            f"{c.n_head}, which does not divide it; use to=gguf"
        )
    ids = special_tokens.ids(tokenizer)
    if c.labels:
        tokenizer = opening(tokenizer)
        ids = {**ids, "pad_token_id": pad_of(tokenizer)}
    state = {name: w.detach().float().cpu() for name, w in model.state_dict().items()}
    tensors.save(weights.to_theirs(c, state), folder / WEIGHTS)
    write_json(folder / "config.json", weights.to_config(c, ids))
    special_tokens.write(folder, tokenizer, c.context_length)
    (folder / "tokenizer.json").write_text(tokenizer_json.to_json(tokenizer))
    (folder / "README.md").write_text(card)


def opening(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer for a classifier: each text begins with the start token, as in training."""
    extras = dataclasses.replace(tokenizer.extras, bos=tokenizer.start)
    return Tokenizer(tokenizer.name, tokenizer.pattern, tokenizer.ranks, tokenizer.eot, extras)


def pad_of(tokenizer: Tokenizer) -> int:
    """Id of the token that fills up the shorter texts of a batch."""
    found = tokenizer.extras.ids.get("pad_token_id", tokenizer.eot)
    return found if isinstance(found, int) else tokenizer.eot


def auto_class(folder: Path) -> str:
    """The name of transformers' class that opens what `write` wrote to a folder."""
    config = foreign.read_json(str(folder / "config.json"), dict[str, Any], CheckpointError)
    is_classifier = "id2label" in config
    return "AutoModelForSequenceClassification" if is_classifier else "AutoModelForCausalLM"


def check(folder: Path, model: GPT, tokenizer: Tokenizer, texts: list[str]) -> dict[str, float]:
    """Opens a folder with transformers, running no code from it, and compares logits and tokens
    with the model's; returns the largest difference of a logit and the number of texts.

    Raises:
        CheckpointError: something differs.
        ConfigError: transformers is not installed.
    """
    found = difference(opened(folder), model, tokenizer)
    if not found <= TOLERANCE:
        raise CheckpointError(
            f"{folder}: logits of transformers' model differ by {found:.2g} (at most "
            f"{TOLERANCE:g} is allowed); please report this with the model's config"
        )
    _check_tokenizer(folder, opening(tokenizer) if model.config.labels else tokenizer, texts)
    return {"logits_differ_by": found, "texts": len(ADVERSARIAL) + 1 + len(texts)}


def opened(folder: Path) -> Any:
    """transformers' model of a folder, fp32, in eval mode. Raises ConfigError if transformers is
    not installed."""
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "this export opens what it wrote with transformers, which is not installed: run "
            "`pip install 'manta[export]'`"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    opener = getattr(transformers, auto_class(folder))
    return opener.from_pretrained(folder, local_files_only=True).float().eval()


def difference(theirs: Any, model: GPT, tokenizer: Tokenizer) -> float:
    """The largest difference of a logit between transformers' model and ours, on random tokens."""
    c = model.config
    random = torch.Generator().manual_seed(0)
    length = min(c.context_length, COMPARED_TOKENS)
    tokens = torch.randint(c.vocab_size or 1, (2, length), generator=random)
    at = None
    if c.labels:  # padding after a text does not count
        pad = pad_of(tokenizer)
        tokens[tokens == pad] = (pad + 1) % (c.vocab_size or 1)
        tokens[1, length // 2 :] = pad
        at = torch.zeros(tokens.shape, dtype=torch.bool)
        at[0, -1] = at[1, length // 2 - 1] = True
    with torch.no_grad():
        return (theirs(tokens).logits - model(tokens, at=at)).abs().max().item()


def _check_tokenizer(folder: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    """Raises CheckpointError if transformers reads a text as other tokens than our tokenizer."""
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    begins = [] if tokenizer.extras.bos is None else [tokenizer.extras.bos]
    names = "x".join(token.content for token in tokenizer.extras.added)
    for text in [*ADVERSARIAL, names, *texts]:
        mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        found = fast.encode(mended, split_special_tokens=True)
        expected = [*begins, *tokenizer.encode(text)]
        if found != expected or fast.decode(found) != tokenizer.decode(expected):
            raise CheckpointError(
                f"{folder}: transformers' tokenizer reads {text[:60]!r} as other tokens; please "
                "report this with the text"
            )


def read(folder: Path) -> tuple[ModelConfig, dict[str, torch.Tensor], Tokenizer | None]:
    """The model of a transformers folder, its weights by our names, and its tokenizer if it has a
    tokenizer.json. Only safetensors and JSON are read; no code from the folder runs.

    Raises:
        CheckpointError: files are missing or damaged, or Manta does not have such a model.
        DataError: Manta cannot use its tokenizer.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"path={folder}: no config.json there; give the folder of a transformers model "
            "(with config.json, model.safetensors, tokenizer.json)"
        )
    where = f"{folder}/config.json"
    c = weights.from_config(foreign.read_json(where, dict[str, Any], CheckpointError), where)
    state = weights.to_ours(c, _tensors(folder, c), str(folder))
    file = folder / "tokenizer.json"
    if not file.is_file():
        return c, state, None
    data = foreign.read_bytes(str(file), DataError)
    return c, state, tokenizer_json.from_json(data, str(file), special_tokens.read(folder))


@dataclasses.dataclass
class _Index:
    """The file that says in which file each weight is."""

    weight_map: dict[str, str]


def _tensors(folder: Path, c: ModelConfig) -> dict[str, torch.Tensor]:
    """The weights in the folder, by transformers' names, of a type and size that `c` can have."""
    names = [WEIGHTS]
    if (folder / INDEX).is_file():
        index = foreign.read_json(f"{folder}/{INDEX}", _Index, CheckpointError)
        names = sorted(set(index.weight_map.values()))
    entries: dict[str, tensors.Entry] = {}
    for name in names:
        if "/" in name or not foreign.is_plain_name(name):
            raise CheckpointError(
                f"{folder}/{INDEX}: {foreign.line(name)!r} is no file in this folder; get it again"
            )
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: {_why_missing(folder, name)}")
        found = weights.without_buffers(tensors.header(f"{folder}/{name}"))
        tensors.check_are_weights(found, f"{folder}/{name}")
        if twice := sorted(entries.keys() & found.keys()):
            raise CheckpointError(
                f"{folder / name}: {foreign.line(twice[0])} is in another file too; get the model "
                "again"
            )
        entries |= found
    tensors.check_sizes(c, {name: entry.shape for name, entry in entries.items()}, str(folder))
    state: dict[str, torch.Tensor] = {}
    for name in names:
        found_weights = weights.without_buffers(tensors.load(folder / name))
        tensors.check_finite(found_weights, f"{folder}/{name}")
        state |= found_weights
    return state


def _why_missing(folder: Path, name: str) -> str:
    """Why a file of weights is not there, and what to do."""
    if (folder / name).is_symlink():
        return "a symbolic link that leads to no file; get the file that it leads to"
    if name != WEIGHTS or (folder / INDEX).is_file():
        return f"no such file, but {INDEX} says that it has weights; get it too"
    pickles = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in folder.glob(kind))
    if pickles:
        return (
            f"no such file, and {named(pickles, most=3)} is a pickle, which can run code; convert "
            "the model to safetensors with transformers"
        )
    return "no such file; get the model's weights as safetensors"
