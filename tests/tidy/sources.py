"""How the tidy tests read the tree: which files count, where a function starts and ends, what a README names.

Only tracked files and new ones that git would take count, so that what is built or cached is never judged. The C
reader is a dozen lines, and knows the one style this code is written in (a function's closing brace stands in column
one); a real parser would be a dependency for the sake of counting lines.
"""

import ast
import fnmatch
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# A file is named with an extension that we use, or as a folder with a closing slash; no spaces, stars or braces.
NAMED_FILE = re.compile(r"`(?P<name>[\w./-]+(?:\.(?:py|c|h|md|toml|txt|yaml|yml|json|sh)|/))`")

# What an unpacked archive may hold besides the sources.
NOT_OURS = re.compile(r"\..+|build|dist|__pycache__|.*\.(?:o|pyc|egg-info)")


@cache
def _files() -> list[str]:
    """Every file that counts, from the root; without git (an unpacked archive) whatever is not built or hidden."""
    listing = [
        "git",
        "-c",
        "safe.directory=*",
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "--deduplicate",
    ]
    try:
        listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (FileNotFoundError, subprocess.CalledProcessError):
        everything = (path.relative_to(ROOT) for path in ROOT.rglob("*"))
        listed = [str(path) for path in everything if not any(NOT_OURS.fullmatch(part) for part in path.parts)]
    return sorted(file for file in listed if (ROOT / file).is_file())


def tracked(*patterns: str) -> list[Path]:
    """Files that git knows or would add, and that exist, sorted; a star matches slashes, too."""
    return [ROOT / file for file in _files() if any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)]


def name(path: Path) -> str:
    """The path as people say it: from the root of the repository."""
    return str(path.relative_to(ROOT))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=name(path))


def python_functions(path: Path) -> Iterator[tuple[str, int]]:
    """Every function with its lines, from `def` to its end, decorators not counted."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def c_functions(path: Path) -> Iterator[tuple[str, int]]:
    """Every function with its lines, from the `{` that ends its parameter list (or stands alone) to its `}`."""
    opened_at: int | None = None
    said = ""
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if opened_at is None and line[:1] not in {"", " ", "\t", "#", "/", "*", "{", "}"} and "(" in line:
            said = line
        if opened_at is None and (line == "{" or (re.search(r"\)\s*\{$", line) and line[:1] != "#")):
            opened_at = number
        elif opened_at is not None and line.startswith("}"):
            called = re.search(r"(\w+)\(", said)
            yield (called[1] if called else said), number - opened_at + 1
            opened_at = None


def imported_roots(path: Path) -> set[str]:
    """The first names of all imports, wherever they stand in the file; relative ones count as `lbpod`."""
    roots: set[str] = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            roots.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "lbpod").split(".")[0] if node.level == 0 else "lbpod")
    return roots


def walked_sets(path: Path) -> list[str]:
    """Loops and comprehensions whose subject is plainly a set, as `file:line`."""
    found = []
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
            subject = node.iter
            called = subject.func.id if isinstance(subject, ast.Call) and isinstance(subject.func, ast.Name) else ""
            if isinstance(subject, ast.Set | ast.SetComp) or called in {"set", "frozenset"}:
                found.append(f"{name(path)}:{subject.lineno}")
    return found


def calls_of(path: Path, function: str) -> list[str]:
    """Calls of a plain name, as `file:line`."""
    return [
        f"{name(path)}:{node.lineno}"
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function
    ]


def c_limits(path: Path) -> dict[str, int]:
    """`#define HF_NAME value` as {NAME: value}; values are integers, shifts, products and earlier names."""
    known: dict[str, int] = {}
    for line in path.read_text().splitlines():
        defined = re.match(r"#define\s+HF_(\w+)\s+([^/]+?)\s*(?:/[/*].*)?$", line)
        if defined is None:
            continue
        plain = re.sub(r"(?<=[0-9a-fA-F])(?:[uU]?[lL]{0,2})\b", "", defined[2]).replace("HF_", "")
        if re.fullmatch(r"[\w\s()+*<>-]+", plain) is None:
            continue
        try:
            value = eval(plain, {"__builtins__": {}}, dict(known))  # our own header, characters checked above
        except (NameError, SyntaxError):
            continue  # a macro of another kind
        if isinstance(value, int):
            known[defined[1]] = value
    return known


def named_files(readme: Path) -> list[str]:
    """What the README puts in backticks as a file or a folder, outside of code blocks."""
    prose = re.sub(r"^```.*?^```", "", readme.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [found["name"] for found in NAMED_FILE.finditer(prose)]


def leads_somewhere(folder: Path, named: str) -> bool:
    """True if the name exists beside the README, or from the root; absolute paths are the machine's, not ours."""
    return named.startswith("/") or (folder / named).exists() or (ROOT / named).exists()
