"""Lines of code by room of `fastrot` and `kernels`, and whether their total keeps to the budget.

A line of code holds something else than blanks, comments and docstrings. Exit code 1 above the budget.
"""

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

BUDGET = 28_500
ROOT = Path(__file__).resolve().parent.parent
C_SUFFIXES = (".c", ".h", ".cpp", ".cu", ".cuh")
_SILENT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER,
}  # fmt: skip
# what a comment is, but not within a string or a character
_C = re.compile(r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""", re.DOTALL)


def python_lines(text: str) -> int:
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                docstrings |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _SILENT:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings)


def c_lines(text: str) -> int:
    bare = _C.sub(lambda found: found[0] if found[0][0] in "\"'" else "\n" * found[0].count("\n"), text)
    return sum(bool(line.strip()) for line in bare.splitlines())


def rooms(root: Path) -> Counter[str]:
    """{room: lines of code}: a folder right below `fastrot` or the kernels' package, or one of these for its own files."""
    found: Counter[str] = Counter()
    for top in (root / "fastrot", root / "kernels" / "fastrot_kernels"):
        for path in sorted(top.rglob("*")):
            inside = path.relative_to(top).parts
            room = "/".join([top.name, *inside[:1]]) if len(inside) > 1 else top.name
            if path.suffix == ".py":
                found[room] += python_lines(path.read_text())
            elif path.suffix in C_SUFFIXES:
                found[room] += c_lines(path.read_text())
    return found


def main() -> int:
    lines = rooms(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
    for room, count in sorted(lines.items()):
        print(f"{count:7,}  {room}")
    total = sum(lines.values())
    print(f"{total:7,}  lines of code; the budget is {BUDGET:,}")
    return int(total > BUDGET)


if __name__ == "__main__":
    sys.exit(main())
