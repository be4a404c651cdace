"""Valid command lines and configuration files, and what a fuzzer makes of them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

CONFIGS = Path(__file__).parent.parent / "configs"
DIGITS = ("--data.source=digits", "--data.image_size=8", "--data.canvas=[8,24]", "--data.distance=4")
SIZES = ("--data.train=8", "--data.validation=4", "--data.test=4")
DRAWN = ("--train=2", "--validation=1", "--test=1", "--workers=1", "--root=data")
FILES = ["quickstart.yaml", *(f"recovery/{path.name}" for path in sorted((CONFIGS / "recovery").glob("*.yaml")))]
SWEEPS = ["sweeps/quickstart_smoke.yaml", "sweeps/quickstart.yaml", "sweeps/pathfinder_small.yaml"]
# {run}: a finished run; {file}: a configuration
COMMANDS: dict[str, tuple[str, ...]] = {
    **{f"fit {name}": ("fit", "--config={file}", "--run_dir=out") for name in FILES},
    **{f"sweep {name}": ("sweep", "{file}", "--out=out", "--parallel=1") for name in SWEEPS},
    "fit": ("fit", "--config=configs/quickstart.yaml", "--run_dir=out", "--trainer.max_epochs=1", *DIGITS, *SIZES),
    "test": ("test", "--config={run}/config.yaml", "--run_dir={run}", "--ckpt_path=last"),
    "figure xy": ("figure", "xy", "{run}", "--x=iterations", "--y=train/loss", "--points=true", "--out=out/xy"),
    "figure dynamics": ("figure", "dynamics", "{run}", "--title=a", "--out=out/dynamics"),
    "figure accuracy": ("figure", "accuracy", "table.csv", "--x=distance", "--group", "weight", "--out=out/accuracy"),
    "rank": ("rank", "--checkpoint={run}/last.ckpt", "--out=out", "--what=nodes", "--rtol=0.01", "--seed=1"),
    "rank of another": (
        *("rank", "--model=SmallResNet", "--model.widths=[4,4]", "--model.strides=[1,1]", "--model.in_channels=1"),
        *("--images=digits", "--out=out", "--what=cuts", "--number=8", "--size=4", "--repetitions=1"),
    ),
    "make-data export": ("make-data", "export", "--data=SameClass", *DIGITS, *SIZES, "--out=out", "--format=png"),
    "make-data pathfinder": ("make-data", "pathfinder", "--preset=lra32", *DRAWN),
    "make-data cabc": ("make-data", "cabc", *DRAWN),
}
TABLE = "variant,data.distance,model.weight,epochs,test/accuracy\nrun,0,0,3,0.9\nrun,4,0,3,0.7\nrun,0,1,3,0.8\n"

_CODE = "!!python/object/apply:os.mkdir [planted]"
_BOMB = "{" + ", ".join(f"a{k}: &a{k} [" + ", ".join([f"*a{k - 1}" if k else "x"] * 9) + "]" for k in range(9)) + "}"
TEXTS = (
    *("", " ", "nan", "inf", "-1", "0", "2.5", "1e400", "9" * 400, "null", "true", "typo", "None", "1_0", "0x10"),
    *("[", "{", "[1,", "]", "[" * 3000, "{a: 1}", "[a, 1]", "[[0, 1], 2]", "*a", "&a [*a]", _CODE, _BOMB, "@x", "~"),
    *("\t", "é\u2028", "\udcff", "--", "-", "=", "a=b", "absent/x.yaml", "2020-01-01", "absent.Class", "json.dumps"),
    *("torch.nn.Linear", "{class_path: torch.nn.Linear}", "{class_path: typo, init_args: 3}", "{init_args: {}}"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 10**9, 10**30, 2.5, float("nan"), float("inf"), "", "typo", "nan", "1e-3"),
    *([], {}, [None], [[]], ["a"], [1, [2]], {"a": 1}, {1: 2}, {"class_path": "typo"}, {"class_path": 3}),
    *({"class_path": "torch.nn.Linear", "init_args": []}, "absent.Class", ["quickstart.yaml"], "quickstart.yaml"),
)
_LINES = ("typo: 1", "- 1", "\ttrainer: 1", "a: &a [*a]", "<<: 1", "? [1]", "%YAML 9.9", "---", "...", f"x: {_BOMB}")


def words(draw: Callable[..., Any], command: tuple[str, ...], seed: str) -> list[str]:
    """A command line with one or two of its words changed, left out or repeated, or others put in."""
    found, texts = list(command), list(TEXTS)
    random.Random(seed).shuffle(texts)
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(1, len(found) - 1)) if len(found) > 1 else 0
        option, equals, _ = found[place].partition("=")
        text = draw(st.sampled_from(texts))
        match draw(st.sampled_from(("value", "value", "option", "cut", "delete", "repeat", "insert", "new"))):
            case "value":
                found[place] = f"{option}={text}" if equals else text
            case "option":
                found[place] = found[place].replace(
                    option, draw(st.sampled_from(("--typo", option + "x", option[:-1])))
                )
            case "cut":
                found[place] = option
            case "delete":
                del found[place]
            case "repeat":
                found.insert(place, found[place])
            case "insert":
                found.insert(place, text)
            case "new":
                names = ("--config", "--trainer", "--trainer.devices", "--trainer.callbacks", "--trainer.precision")
                names += ("--model", "--model.optimizer", "--model.network", "--data", "--data.seed", "--ckpt_path")
                names += ("--seed_everything", "--labels", "--where", "--weights", "--what", "--help", "--print_config")
                found.append(f"{draw(st.sampled_from(names))}={text}")
    return found


def contents(draw: Callable[..., Any], text: str, seed: str) -> bytes:
    """A YAML file with a value or a key changed, left out or repeated, or its text spoilt."""
    shuffle = random.Random(seed).shuffle
    if draw(st.booleans()):
        tree = yaml.safe_load(text)
        for _ in range(draw(st.integers(1, 2))):
            tree = _changed(draw, tree, seed)
        return yaml.safe_dump(tree, sort_keys=False).encode()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")] or [""]
    place = draw(st.integers(0, len(lines) - 1))
    indent = lines[place][: len(lines[place]) - len(lines[place].lstrip())]
    new, texts = list(_LINES), list(TEXTS)
    shuffle(new)
    shuffle(texts)
    match draw(st.sampled_from(("value", "line", "repeat", "delete", "indent", "cut", "bytes", "null", "bom"))):
        case "value":
            lines[place] = lines[place].partition(":")[0] + ": " + draw(st.sampled_from(texts))
        case "line":
            lines.insert(place, indent + draw(st.sampled_from(new)))
        case "repeat":
            lines.insert(place, lines[place])
        case "delete":
            del lines[place]
        case "indent":
            lines[place] = "  " + lines[place]
        case "cut":
            lines = [*lines[:place], lines[place][: len(lines[place]) // 2]]
        case "bytes":
            return "\n".join([*lines[:place], "\udcff", *lines[place:]]).encode(errors="surrogateescape")
        case "null":
            lines[place] += "\x00"
        case "bom":
            return "\n".join(lines).encode("utf-16")
    return "\n".join(lines).encode(errors="surrogateescape")


def _places(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if above:
        yield above
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from _places(value, (*above, key))


def _changed(draw: Callable[..., Any], tree: Any, seed: str) -> Any:
    tree = copy.deepcopy(tree)
    places, values = list(_places(tree)), list(VALUES)
    if not places:
        return draw(st.sampled_from(values))
    random.Random(seed).shuffle(places)
    random.Random(seed).shuffle(values)
    *above, key = draw(st.sampled_from(places))
    holder = tree
    for one in above:
        holder = holder[one]
    value = draw(st.sampled_from(values))
    match draw(st.sampled_from(("replace", "replace", "delete", "rename", "insert", "wrap"))):
        case "replace":
            holder[key] = value
        case "delete":
            del holder[key]
        case "rename" if isinstance(holder, dict):
            holder[draw(st.sampled_from((f"{key}x", str(key)[:-1], 3, None, True)))] = holder.pop(key)
        case "insert" if isinstance(holder, dict):
            holder[draw(st.sampled_from(("typo", "class_path", "init_args", "dict_kwargs", "seed", 1)))] = value
        case _:
            holder[key] = [holder[key]]
    return tree
