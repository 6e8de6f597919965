"""A model in a local folder, as `save_pretrained` writes one: config, safetensors, tokenizer."""

import fnmatch
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.errors import UserError
from stages.home import expanded
from stages.identity import Json
from stages.sources import Found, credentials, remote, urls
from stages.sources.digests import digests, refuse_pointer, refuse_pointers
from stages.stage import Facts, Work
from stages.weight_files import INDEX

ALLOWED = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    INDEX,
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
)
"""What a model consists of. Anything else (pickles, code, optimizer states) stays where it is."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
CHUNK = 16 << 20


def resolve(location: str, place: str, cache: Path) -> Found:
    """The model's files by digest. Raises UserError when the folder does not hold a whole model."""
    folder = expanded(location, place)
    if not folder.is_dir():
        raise UserError(f"{place}: there is no folder {location} (looked from {Path.cwd()})")
    paths = listing(folder, place)
    found = {path.name: digest for path, digest in zip(paths, digests(paths, cache), strict=True)}
    return Found({"files": found}, {"path": str(folder.resolve())})


def listing(folder: Path, place: str) -> list[Path]:
    """The model's files in a folder. Raises UserError for what is missing or leads out of the folder."""
    paths = sorted(p for p in folder.iterdir() if p.is_file() and any(fnmatch.fnmatch(p.name, a) for a in ALLOWED))
    root = folder.resolve()
    # The Hub's cache keeps the files of a snapshot as links into `blobs` beside `snapshots`.
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in paths:
        if not any(path.resolve().is_relative_to(home) for home in homes):
            raise UserError(f"{place}: {path.name} is a link that leaves the folder: copy the file there")
    names = [path.name for path in paths]
    check(names, [path.name for path in folder.iterdir()], place)
    refuse_pointers(paths, place)
    if INDEX in names:
        _check_weights((folder / INDEX).read_bytes(), names, place)
    return paths


def _check_weights(index: bytes, names: Sequence[str], place: str) -> None:
    """Raises UserError unless the files are all those that an index names."""
    try:
        shards = set(json.loads(index)["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        told = f'{INDEX} is no index, or cut short: expected {{"weight_map": {{TENSOR: FILE}}}}'
        raise UserError(f"{place}: {told}. Copy it once more, or save the model again") from error
    if missing := sorted(shards - set(names)):
        raise UserError(f"{place}: {missing[0]} is missing ({len(missing)} of {len(shards)} weight files are)")


def check(names: Sequence[str], all_names: Sequence[str], place: str) -> None:
    """Raises UserError unless the files are a whole model."""
    if "config.json" not in names:
        raise UserError(f"{place}: has no config.json: expected a model folder as transformers saves it")
    if not any(name.endswith(".safetensors") for name in names):
        if any(fnmatch.fnmatch(name, pickle) for name in all_names for pickle in PICKLES):
            raise UserError(
                f"{place}: its weights are pickles, which can run code when they are read. Save it as safetensors "
                "first: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) in a place you trust"
            )
        raise UserError(f"{place}: has no *.safetensors")
    if "tokenizer.json" not in names:
        raise UserError(
            f"{place}: has no tokenizer.json: make one with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )


def resolve_url(location: str, options: Mapping[str, Json], place: str) -> Found:
    """The model's files at a URL by etag. Raises UserError when they are not a whole model."""
    fs, path = urls.filesystem(location, options, place)
    try:
        infos = {info["name"].rpartition("/")[2]: info for info in fs.ls(path, detail=True) if info["type"] == "file"}
        index = fs.cat_file(infos[INDEX]["name"]) if INDEX in infos else None
    except Exception as error:  # each of fsspec's file systems has errors of its own
        told = credentials.without_secrets(str(error), options) or type(error).__name__
        raise UserError(f"{place}: cannot read {location}: {told}") from error
    names = sorted(name for name in infos if any(fnmatch.fnmatch(name, allowed) for allowed in ALLOWED))
    check(names, list(infos), place)
    if index is not None:
        refuse_pointer(INDEX, index, place)
        _check_weights(index, names, place)
    found = {name: {"size": infos[name]["size"], **urls.version(fs, infos[name])} for name in names}
    return Found(
        {"files": found}, {"url": fs.unstrip_protocol(path), **({"options": dict(options)} if options else {})}
    )


def bring(found: Mapping[str, Json], where: Mapping[str, Json], output: Path, work: Work) -> Facts:
    """Copy the model. Raises UserError when a file is no longer what was resolved."""
    folder = Path(where["path"])
    return copy([folder / name for name in found["files"]], output, work, found["files"])


def bring_url(found: Mapping[str, Json], where: Mapping[str, Json], output: Path, work: Work) -> Facts:
    """Download the model; a killed attempt is gone on with. Raises UserError for a file that is another by now."""
    total = sum(file["size"] for file in found["files"].values())
    done = 0

    def told(here: int) -> None:
        work.tell(done + here, total, "bytes")

    aside = work.folder / "download"
    aside.mkdir(exist_ok=True)
    for name, file in found["files"].items():
        open_at = urls.opener(f"{where['url']}/{name}", where.get("options", {}), file, name)
        remote.download(name, open_at, file["size"], aside / name, told)
        done += file["size"]
    refuse_pointers(aside.iterdir(), str(where["url"]))
    for name in found["files"]:
        shutil.move(aside / name, output / name)
    return {"bytes": total}


def copy(paths: Sequence[Path], output: Path, work: Work, expected: Mapping[str, str] | None = None) -> Facts:
    """Copy files, checking their digests on the way where they are given."""
    total = sum(path.stat().st_size for path in paths)
    done = 0
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as source, (output / path.name).open("wb") as sink:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                sink.write(chunk)
                done += len(chunk)
                work.tell(done, total, "bytes")
        if expected is not None and digest.hexdigest() != expected[path.name]:
            raise UserError(f"{path.name} changed while the run was going on: run again")
    return {"bytes": total}
