"""What the files next to a transformers tokenizer.json say of its tokens, and back: which token
has which part, where generation ends, the template of a chat."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from manta import foreign
from manta.config import Natural
from manta.errors import DataError
from manta.text.tokenizer import Tokenizer
from manta.text.tokenizer_extras import usual_ids, usual_names
from manta.text.tokenizer_json import Roles

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"  # older files have the names there too
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
OTHER_TEMPLATES = "additional_chat_templates"
MAIN = "default"  # the name of the template that is used where none is named


@dataclasses.dataclass
class _Token:
    content: str


@dataclasses.dataclass
class _Template:
    name: str
    template: str


@dataclasses.dataclass
class _Names:
    bos_token: str | _Token | None = None
    eos_token: str | _Token | None = None
    unk_token: str | _Token | None = None
    pad_token: str | _Token | None = None
    sep_token: str | _Token | None = None
    cls_token: str | _Token | None = None
    mask_token: str | _Token | None = None
    chat_template: str | list[_Template] | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None


@dataclasses.dataclass
class _Ids:
    bos_token_id: Natural | list[Natural] | None = None
    eos_token_id: Natural | list[Natural] | None = None
    pad_token_id: Natural | list[Natural] | None = None


def read(folder: Path) -> Roles:
    """The parts of the tokens of a transformers folder.

    Raises:
        DataError: a file is damaged, or has a setting that Manta does not have.
    """
    found = _Names()
    names: dict[str, str] = {}
    for file in (folder / SPECIAL_TOKENS_MAP, folder / TOKENIZER_CONFIG):
        if not file.is_file():
            continue
        found = foreign.read_json(str(file), _Names, DataError)
        given = {key: getattr(found, key) for key in NAMES}
        names |= {k: v.content if isinstance(v, _Token) else v for k, v in given.items() if v}
    for key in ("add_eos_token", "add_prefix_space"):
        if getattr(found, key):
            raise DataError(
                f"{folder / TOKENIZER_CONFIG}: {key}=true; Manta reads only tokenizers without it"
            )
    return Roles(
        names,
        _ids(folder / "config.json"),
        _ids(folder / GENERATION_CONFIG),
        _chat_template(folder, found),
        found.add_bos_token,
    )


def _ids(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    found = dataclasses.asdict(foreign.read_json(str(file), _Ids, DataError))
    return {key: ids for key, ids in found.items() if ids is not None}


def _chat_template(folder: Path, names: _Names) -> str | dict[str, str] | None:
    given, templates = names.chat_template, {}
    if given is not None:
        listed = [_Template(MAIN, given)] if isinstance(given, str) else given
        templates = {template.name: template.template for template in listed}
    files = {MAIN: folder / CHAT_TEMPLATE}
    files |= {file.stem: file for file in sorted((folder / OTHER_TEMPLATES).glob("*.jinja"))}
    for name, file in files.items():
        if file.is_file():
            try:
                templates[name] = foreign.read_bytes(str(file), DataError).decode()
            except UnicodeDecodeError:
                raise DataError(f"{file}: not UTF-8 text; get the file again") from None
    return templates.get(MAIN) if templates.keys() <= {MAIN} else templates


def ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The keys of a config.json for the ids of tokens."""
    return tokenizer.extras.ids or usual_ids(tokenizer.extras, tokenizer.eot)


def write(folder: Path, tokenizer: Tokenizer, context_length: int) -> None:
    """Writes tokenizer_config.json, generation_config.json and a chat's template."""
    extras = tokenizer.extras
    derived = {**ids(tokenizer), "pad_token_id": tokenizer.eot}
    write_json(folder / GENERATION_CONFIG, extras.generation_ids or derived)
    template = extras.chat_template
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        **(extras.names or usual_names(extras, tokenizer.eot)),
        "clean_up_tokenization_spaces": False,
        # Text that spells a special token is plain text. (transformers renders a chat to text,
        # special tokens included, and then encodes it, so there it must not be.)
        "split_special_tokens": template is None,
    }
    if isinstance(template, dict):
        settings["chat_template"] = [{"name": n, "template": t} for n, t in template.items()]
    elif template is not None:
        (folder / CHAT_TEMPLATE).write_text(template)
    write_json(folder / TOKENIZER_CONFIG, settings)


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
