"""Do the tests notice? Small changes of the numerical code, one at a time, and after each the tests that use the file.

    python benchmarks/mutants.py --count 50 --seed 0
    python benchmarks/mutants.py --again                # those that have survived and are not explained

A mutant swaps an operator, a comparison, a condition or a constant in regularizer/, tensors/ or ranks/, in a copy of
the repository. It is killed if a test fails, or if they do not end in time: first of the tests that name the module,
then of those that name what it makes public. Each is printed, and written to benchmarks/results/mutants.json, where
an "explanation" may be added by hand. Without CUDA, fused.py and cuda_graph.py are left out.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from hardware import command as recorded
from hardware import processor_name, versions

ROOT = Path(__file__).parent.parent
FOLDERS = ("regularizer", "tensors", "ranks")
NEEDS_CUDA = ("fused.py", "cuda_graph.py")
SWAPPED: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.MatMult: ast.Mult, ast.Mod: ast.Add, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.USub: ast.UAdd,
}  # fmt: skip


def mutations(path: Path) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Expressions of a file and what they become; not annotations, messages and what only types see."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        words = [
            getattr(node, "annotation", None),
            getattr(node, "returns", None),
            *getattr(node, "decorator_list", []),
        ]
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
            words.append(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("cast", "isinstance", "TypeVar"):
            words.append(node)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0])[:1].isupper():
            words.append(node)  # names of types
        for word in words:
            skipped |= set(ast.walk(word)) if word is not None else set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
            yield node, ast.Compare(node.left, [SWAPPED[type(node.ops[0])](), *node.ops[1:]], node.comparators)
        elif isinstance(node, ast.BoolOp):
            yield node, ast.BoolOp(SWAPPED[type(node.op)](), node.values)
        elif isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
            yield node, ast.BinOp(node.left, SWAPPED[type(node.op)](), node.right)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node, node.operand
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield node, ast.UnaryOp(ast.UAdd(), node.operand)
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield node, ast.Constant(not node.value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            yield node, ast.Constant(node.value + 1)


def mutated(source: str, node: ast.expr, new: ast.expr) -> str:
    lines = source.encode().splitlines(keepends=True)  # columns of ast are bytes
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    first, last = node.lineno - 1, node.end_lineno - 1
    text = lines[first][: node.col_offset] + f"({ast.unparse(new)})".encode() + lines[last][node.end_col_offset :]
    return b"".join([*lines[:first], text, *lines[last + 1 :]]).decode()


def tests_of(path: Path, root: Path) -> list[str]:
    """Tests that name the module, then those that name what it makes public, each smallest file first."""
    module = f"{path.parent.name}.{path.stem}"
    names = re.findall(r'"(\w+)"', re.search(r"__all__[^\]]*\]", path.read_text())[0])  # type: ignore[index]
    word = re.compile(rf"\b({'|'.join([re.escape(module), *names])})\b")
    found = {test: test.read_text() for test in (root / "tests").glob("test_*.py")}
    named = sorted((module not in text, len(text), test) for test, text in found.items() if word.search(text))
    return [str(test.relative_to(root)) for _, _, test in named]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="those of --out that survived without explanation")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds for the tests of one mutant")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/mutants.json")
    options = parser.parse_args()
    files = [path for folder in FOLDERS for path in sorted((ROOT / "lightning_locality" / folder).glob("*.py"))]
    files = [path for path in files if torch.cuda.is_available() or path.name not in NEEDS_CUDA]
    places = [(path, *pair) for path in files for pair in mutations(path)]
    rows: list[dict[str, object]] = json.loads(options.out.read_text())["mutants"] if options.again else []
    chosen = random.Random(options.seed).sample(places, len(rows) or options.count)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("lightning_locality", "tests", "configs", "docs", "results", "data", "benchmarks"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "inputs", "_build"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, copy)
        for number, (path, node, new) in enumerate(chosen, start=1):
            relative, change = path.relative_to(ROOT), f"{ast.unparse(node)}  ->  {ast.unparse(new)}"
            row: dict[str, object] = {"file": str(relative), "line": node.lineno, "change": change}
            if options.again:
                if rows[number - 1]["file"] != row["file"] or rows[number - 1]["change"] != change:
                    parser.error("--again: the code, or the seed, is not that of --out")
                if rows[number - 1]["outcome"] != "survived" or "explanation" in rows[number - 1]:
                    continue
                row = rows.pop(number - 1) | row
            source, tests = path.read_text(), tests_of(path, ROOT)
            (copy / relative).write_text(mutated(source, node, new))
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
            environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
            begun = time.perf_counter()
            try:
                done = subprocess.run(
                    command, cwd=copy, env=environment, capture_output=True, text=True, timeout=options.timeout
                )
                outcome = "survived" if done.returncode == 0 else "killed"
                assert done.returncode in (0, 1, 2), done.stdout + done.stderr
            except subprocess.TimeoutExpired:
                outcome = "killed (no end)"
            (copy / relative).write_text(source)
            row |= {"tests": tests, "outcome": outcome, "seconds": round(time.perf_counter() - begun)}
            rows.insert(number - 1, row)
            print(f"{number:3} {outcome:15} {relative}:{node.lineno}: {change}", flush=True)
            made_by = {"command": recorded("benchmarks/mutants.py"), "processor": processor_name()}
            content = {**made_by, "versions": versions("torch", "pytest"), "mutants": rows}
            options.out.write_text(json.dumps(content, indent=1) + "\n")
    survived = sum(row["outcome"] == "survived" for row in rows)
    print(f"{len(rows) - survived} of {len(rows)} killed")


if __name__ == "__main__":
    main()
