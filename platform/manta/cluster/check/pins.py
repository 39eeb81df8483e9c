"""The versions that nodes install: clusters/requirements.txt and the images' tags.

pyproject.toml says which versions do. `python -m manta.cluster pins` writes the exact ones of this
environment, which the tests ran with, into clusters/requirements.txt, and this Ray and Python into
the images' tags.
"""

import platform
import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

import manta
from manta.cluster.check.documents import Problem
from manta.errors import ClusterError

CHECKOUT = Path(manta.__file__).resolve().parents[2]
REQUIREMENTS = Path("clusters", "requirements.txt")
HEADER = """\
# What nodes install. Written by `python -m manta.cluster pins` from pyproject.toml: edit that.
"""
# Ray's own images, and Manta's, whose tag has both versions too.
IMAGE = re.compile(
    r"(?P<name>\brayproject/ray|[\w./-]*\bmanta):(?P<ray>[\w.]+?)-py(?P<python>\d+)\b"
)
PIN = re.compile(r"""(?<![\w.-])([A-Za-z][\w.-]*)(?:\[[\w,]+\])?==([\w.]+)""")


def needed(checkout: Path = CHECKOUT) -> list[Requirement]:
    """The requirements of the project and of its extra `cloud`, in the order of pyproject.toml.

    Raises:
        ClusterError: Manta was installed without its checkout, so there is no pyproject.toml.
    """
    try:
        with (checkout / "pyproject.toml").open("rb") as file:
            project = tomllib.load(file)["project"]
    except FileNotFoundError:
        raise ClusterError(
            f"{checkout}: there is no pyproject.toml; use Manta from a checkout of its repository"
        ) from None
    return [
        Requirement(line)
        for line in project["dependencies"] + project["optional-dependencies"]["cloud"]
    ]


def ray_version() -> str:
    return metadata.version("ray")


def python_tag() -> str:
    """This Python as the tag of an image has it: 311."""
    return "".join(platform.python_version_tuple()[:2])


def pinned(checkout: Path = CHECKOUT) -> str:
    """The text of clusters/requirements.txt for this environment. A package that is not installed
    here keeps the version that it has in the file.

    Raises:
        ClusterError: a package is neither installed nor in the file in a version that does.
    """
    file = checkout / REQUIREMENTS
    before = dict(PIN.findall(file.read_text())) if file.exists() else {}
    lines = []
    for it in needed(checkout):
        try:
            version = metadata.version(it.name).partition("+")[0]
        except metadata.PackageNotFoundError:
            version = before.get(it.name, "")
        if not version or not it.specifier.contains(version):
            raise ClusterError(
                f"{it} is needed by pyproject.toml, and {version or 'no version'} is here: run "
                "`pip install -e '.[cloud]'`, then this command again"
            )
        extras = f"[{','.join(sorted(it.extras))}]" if it.extras else ""
        lines.append(f"{it.name}{extras}=={version}\n")
    return HEADER + "".join(lines)


def write(checkout: Path = CHECKOUT) -> list[str]:
    """Writes the versions of this environment wherever clusters/ has one: the requirements, and
    the tags of Ray's images. Returns the names of the files that changed.

    Raises:
        ClusterError: a version is not known here, or a file cannot be written.
    """
    changed = []
    texts = {checkout / REQUIREMENTS: pinned(checkout)}
    tag = f"{ray_version()}-py{python_tag()}"
    for file in sorted((checkout / "clusters").rglob("*")):
        if file.suffix in (".yaml", ".sbatch") or file.name == "Dockerfile":
            text = IMAGE.sub(rf"\g<name>:{tag}", file.read_text())
            texts[file] = re.sub(r"(rayVersion: )[\w.'\"]+", rf'\g<1>"{ray_version()}"', text)
    for file, text in texts.items():
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
            changed.append(str(file.relative_to(checkout)))
    return changed


def problems(text: str, checkout: Path = CHECKOUT) -> Iterator[Problem]:
    """Versions in a file that are not those of pyproject.toml, this Ray and this Python.

    Raises:
        ClusterError: there is no pyproject.toml.
    """
    required = {canonicalize_name(it.name): it for it in needed(checkout)}
    ray, python = ray_version(), python_tag()
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("#") and "SBATCH" not in line:
            continue
        for name, version in PIN.findall(line):
            it = required.get(canonicalize_name(name))
            if it is not None and not it.specifier.contains(version):
                yield Problem(number, f"{name}=={version}, but pyproject.toml says {it}")
        for image in IMAGE.finditer(line):
            if image["ray"] != ray or image["python"] != python:
                yield Problem(
                    number,
                    f"{image[0]} has another Ray or Python than this machine's: client and cluster "
                    f"must have the same, {image['name']}:{ray}-py{python}",
                )
        for version in re.findall(r"\brayVersion: *['\"]?([\w.]+)", line):
            if version != ray:
                yield Problem(number, f"rayVersion {version}, but this machine has Ray {ray}")
        for major, minor in re.findall(r"\bpython(\d)\.(\d+)\b", line):
            if major + minor != python:
                yield Problem(
                    number,
                    f"python{major}.{minor}, but this machine has Python "
                    f"{platform.python_version()}: Ray wants the same minor version on both",
                )
        if re.search(r":(latest|nightly)\b", line):
            yield Problem(number, "an image with the tag latest or nightly: name one release")


def requirements_problems(file: Path, checkout: Path = CHECKOUT) -> Iterator[str]:
    """What a file of requirements that nodes install lacks for the project, or has otherwise."""
    installed = {}
    for line in file.read_text().splitlines():
        if (plain := line.partition("#")[0].strip()) and not plain.startswith("-"):
            try:
                it = Requirement(plain)
            except InvalidRequirement:
                yield f"{plain!r} is not a requirement"
            else:
                installed[canonicalize_name(it.name)] = it
    for it in needed(checkout):
        found = installed.get(canonicalize_name(it.name))
        exact = re.fullmatch(r"==([\w.]+)", str(found.specifier)) if found else None
        if found is None:
            yield f"{it} is missing, which pyproject.toml needs"
        elif exact is None:
            yield f"{found} is not one exact version, so nodes could differ"
        elif not it.specifier.contains(exact[1]) or not it.extras <= found.extras:
            yield f"{found}, but pyproject.toml says {it}"
