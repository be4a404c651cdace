"""Pages of the site that are made of the repository: names, options, configurations with a picture, figures.

Each directive writes Markdown, which is parsed as if it stood in the page.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import lightning_locality
from lightning_locality.cli import main

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
RESULTS = ROOT / "results"
PICTURES = ROOT / "docs" / "_pictures"  # drawn when the site is built; not tracked
CONSOLE = re.compile(r"^```console\n.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[([^][]*)\]\(([^()\s:#]+)(#[^()\s]*)?\)")


class Generated(SphinxDirective):
    """A directive that is replaced with the Markdown of its ``markdown``."""

    def run(self) -> list[nodes.Node]:
        """Parse the Markdown in the place of the directive."""
        return self.parse_text_to_nodes("\n".join(self.markdown()), allow_section_headings=True)

    def markdown(self) -> Iterator[str]:
        """Yield the lines or blocks of the page."""
        raise NotImplementedError


def public_names(module: str) -> list[str]:
    """Full paths of the public names of a sub-package or module, the shortest from which they can be imported."""
    of = importlib.import_module(f"lightning_locality.{module}")
    own = {k: v for k, v in vars(of).items() if k[0] != "_" and getattr(v, "__module__", "").startswith(of.__name__)}
    top = lightning_locality.__all__
    return [f"{'lightning_locality' if name in top else of.__name__}.{name}" for name in getattr(of, "__all__", own)]


class PublicNames(Generated):
    """The docstrings of all public names of the sub-packages or modules that are the arguments."""

    required_arguments = 1
    final_argument_whitespace = True

    def markdown(self) -> Iterator[str]:
        """One entry of autodoc for every name."""
        paths = [path for module in self.arguments[0].split() for path in public_names(module)]
        parents = [path.rpartition(".")[0] for path in paths]
        for parent in sorted(set(parents), key=lambda parent: (parent.count("."), parents.index(parent))):
            yield f"## `from {parent} import ...`\n"
            for path in sorted((path for path in paths if path.rpartition(".")[0] == parent), key=str.lower):
                value = getattr(importlib.import_module(parent), path.rpartition(".")[2])
                kind = "class" if inspect.isclass(value) else "function" if callable(value) else "data"
                yield f"```{{eval-rst}}\n.. py:currentmodule:: {parent}\n\n.. auto{kind}:: {path}\n```\n"


def _help(args: str) -> str:
    """Help of a command line, without the usage if that is long: the options follow with their descriptions."""
    with redirect_stdout(StringIO()) as out, suppress(SystemExit):
        main(shlex.split(args))
    text = out.getvalue().replace(" \b", "")  # jsonargparse takes a space back
    usage, _, rest = text.partition("\n\n")
    return rest if len(usage.splitlines()) > 8 else text


class CommandHelp(Generated):
    """The help of the command lines that are the content, each under a heading."""

    has_content = True

    def markdown(self) -> Iterator[str]:
        """Each help as it appears on a terminal of 92 columns."""
        os.environ["COLUMNS"] = "92"
        for line in filter(None, self.content):
            yield f"## `lightning-locality {line.removesuffix(' --help')}`\n\n````text\n{_help(line)}````\n"


def _instantiate(settings: dict[str, Any], kind: type) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--it", type=kind)
    return parser.instantiate_classes(parser.parse_object({"it": settings})).it


def draw_inputs(data: dict[str, Any], penalty: dict[str, Any] | None, path: Path) -> bool:
    """Draw four inputs of the data of a configuration, with patches of a penalty; true if digits had to stand in."""
    from pytorch_lightning import LightningDataModule

    from lightning_locality.plotting import example_inputs
    from lightning_locality.regularizer import AntiLocality
    from lightning_locality.regularizer.penalties import bind_boxes

    for name in lightning_locality.__all__:
        getattr(lightning_locality, name)  # imported, a class can be given by its name alone
    from lightning_locality.datamodules import ClutteredABC  # noqa: F401

    options = {**data["init_args"], "train": 16, "validation": 16, "test": 16}
    options.pop("epoch_size", None)
    images = os.environ.get("LIGHTNING_LOCALITY_DATA")
    stand_in = options.get("source", "digits") != "digits" and not images
    with tempfile.TemporaryDirectory() as folder:
        if stand_in:
            size = {"image_size": 32} | {k: v for k, v in options.items() if k == "image_size"}
            options |= {"source": "digits", "resize": "bilinear", **size}
        elif options.get("source", "digits") != "digits":
            options["root"] = images
        else:
            options["root"] = folder
        it = _instantiate({**data, "init_args": options}, LightningDataModule)
        pictures, labels = it.batch("train")
        order = [k for label in labels.unique()[:4] for k in torch.nonzero(labels == label)[:, 0][:2].tolist()][:4]
        pictures, labels, masks = pictures[order], labels[order], None
        if penalty is not None:
            term = _instantiate(penalty, AntiLocality)
            bind_boxes([term], it)
            pair = term.patches.draw(pictures, pictures.roll(-1, 0), torch.Generator().manual_seed(0))
            shape = (len(pictures), 1, *pictures.shape[2:])
            masks = tuple(mask.expand(shape)[:, 0].numpy() for mask in pair)
        names = getattr(it, "class_names", None)
        titles = [names[label] if names else f"label {label}" for label in labels.tolist()]
        figure = example_inputs(np.asarray(pictures), titles, masks)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, bbox_inches="tight")
    return stand_in


def _figures(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


class Configurations(Generated):
    """Every file under a folder of ``configs``: its comment, a picture, and the file itself."""

    required_arguments = 1

    def markdown(self) -> Iterator[str]:
        """One section for every file."""
        for path in sorted((CONFIGS / self.arguments[0]).glob("*.yaml")):
            self.env.note_dependency(str(path))
            name, text = path.relative_to(ROOT).as_posix(), path.read_text()
            comment = re.match(r"(#.*\n)*", text)[0]
            yield f"## `{name}`\n"
            # lines that are indented are commands
            text_lines = [line.removeprefix("#") for line in comment.splitlines()]
            for command, lines in groupby(text_lines, lambda line: line.startswith("   ")):
                block = "\n".join(line.strip() for line in lines)
                yield f"\n```console\n{block}\n```\n" if command else block
            yield ""
            yield from self.picture(path, yaml.safe_load(text))
            yield f"<details><summary>the file</summary>\n\n```yaml\n{text[len(comment) :]}```\n\n</details>\n"

    def picture(self, path: Path, settings: dict[str, Any]) -> Iterator[str]:
        """Inputs of its data, or else the figures of the results that were made with it."""
        penalty = settings.get("model", {}).get("init_args", {}).get("penalty")
        if path.parent.name in ("recovery", "sweeps"):
            yield from _recorded(path)
        elif settings.get("data") or penalty:
            name = f"{path.parent.name}_{path.stem}.png"
            if penalty and "class_path" not in penalty:
                penalty = next(iter(penalty.values()))
            base = path
            if not settings.get("data"):
                of = {"pathfinder": "pathfinder_small", "quickstart": "quickstart"}
                base = CONFIGS / f"{next((of[key] for key in of if key in path.stem), 'same_class')}.yaml"
            replaced = draw_inputs(yaml.safe_load(base.read_text())["data"], penalty, PICTURES / name)
            yield f"![inputs of {base.stem}](_pictures/{name})\n"
            yield f"Inputs of `{base.name}`, with patches I and J.\n" if base != path else ""
            yield (
                "Drawn with scikit-learn's digits, which need no download, in place of its images.\n"
                if replaced
                else ""
            )


def _recorded(path: Path) -> Iterator[str]:
    """The first figures of the pages of results whose commands use a sweep, or a sweep that builds on a file."""
    folder, name = path.parent.name, path.name
    sweeps = {one.name for one in (CONFIGS / "sweeps").glob("*.yaml") if f"../recovery/{name}" in one.read_text()}
    used = [f"configs/{folder}/{name}", *(f"configs/sweeps/{one}" for one in sorted(sweeps))]
    pages = [
        page
        for one in used
        for page in sorted(RESULTS.glob("*/README.md"))
        if any(re.search(rf"{one}(\s|$)", block) for block in CONSOLE.findall(page.read_text()))
    ]
    for page in dict.fromkeys(pages[:2]):
        at = f"../results/{page.parent.name}"
        title = page.read_text().partition("\n")[0].removeprefix("# ")
        yield f"![{title}]({at}/{_figures(page.parent)[0].name})\n\n[{title}]({at}/README.md)\n"
    if not pages:
        yield "No figure of it is recorded.\n"


class Gallery(Generated):
    """Every figure of results, with the title and the commands of its page."""

    def markdown(self) -> Iterator[str]:
        """One section for every folder."""
        for page in sorted(RESULTS.glob("*/README.md")):
            self.env.note_dependency(str(page))
            folder, text = page.parent.name, page.read_text()
            yield f"## [{text.partition(chr(10))[0].removeprefix('# ')}](../results/{folder}/README.md)\n"
            yield from CONSOLE.findall(text)
            yield from (f"\n![{one.stem}](../results/{folder}/{one.name})\n" for one in _figures(page.parent))


def adapt_source(app: Sphinx, docname: str, source: list[str]) -> None:
    """Lead links to folders to their README, as GitHub does, and show the figures of a page of results."""
    folder = Path(app.srcdir, docname).parent

    def page(link: re.Match[str]) -> str:
        words, target, anchor = link.groups()
        if not (folder / target).is_dir():
            return link[0]
        return f"[{words}]({target}/README.md{anchor or ''})" if (folder / target / "README.md").exists() else words

    text = LINK.sub(page, source[0])
    if folder.parent == RESULTS:
        missing = [one.name for one in _figures(folder) if f"]({one.name})" not in text]
        text += "\n\n## Figures\n" * bool(missing) + "".join(f"\n![{name}]({name})\n" for name in missing)
    source[0] = text


def skip_hooks(app: Sphinx, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what only overrides a method of torch or Lightning, which call it."""
    from pytorch_lightning import Callback, LightningDataModule, LightningModule

    foreign = any(
        hasattr(base, name) for base in (Callback, LightningDataModule, LightningModule, torch.optim.Optimizer)
    )
    return True if foreign and what == "class" else None


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    app.add_directive("public-names", PublicNames)
    app.add_directive("command-help", CommandHelp)
    app.add_directive("configurations", Configurations)
    app.add_directive("gallery", Gallery)
    app.connect("source-read", adapt_source)
    app.connect("autodoc-skip-member", skip_hooks)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)  # pictures that are drawn
    return {"parallel_read_safe": False}
