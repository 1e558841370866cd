"""Build the site: `python -m docs.build`.

1. `npm ci`, when the JavaScript and fonts of `package.json` are not there yet in the versions of the lock file;
2. copy of them what the site serves (`VENDOR`);
3. write what Sphinx reads (`docs.stage`);
4. run Sphinx. Warnings are errors.

Needs node's `npm` the first time, and a network (or npm's cache) then; nothing after that. The site itself never needs one.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from docs import stage

DOCS = Path(__file__).resolve().parent

# What the pages load, out of everything that the npm packages hold: folder of the site -> patterns in node_modules.
# MathJax sets formulas as SVG, which needs no web font and so works from file:// in every browser. It is put together from its parts
# (`_static/mathjax-config.js` names them): the bundled file brings a menu and a speech engine, which load more. It may ask for
# TeX extensions and for glyphs outside its base set; the scripts that no formula in this book is written in are left out.
VENDOR: dict[str, list[str]] = {
    "mathjax": ["mathjax/LICENSE", "mathjax/startup.js", "mathjax/core.js"],
    "mathjax/input": ["mathjax/input/tex.js"],
    "mathjax/output": ["mathjax/output/svg.js"],
    "mathjax/a11y": ["mathjax/a11y/assistive-mml.js"],
    "mathjax-newcm-font": ["@mathjax/mathjax-newcm-font/svg.js"],
    "mathjax/input/tex/extensions": ["mathjax/input/tex/extensions/*.js"],
    "mathjax-newcm-font/svg/dynamic": [
        f"@mathjax/mathjax-newcm-font/svg/dynamic/{name}.js"
        for name in ["PUA", "accents*", "arrows", "calligraphic", "double-struck", "fraktur", "greek*", "latin*", "marrows", "math",
                     "monospace*", "mshapes", "sans-serif*", "script", "shapes", "symbols*", "variants"]  # fmt: skip
    ],
    # One file, the same mermaid without mind maps and the loading of parts by `import`, which file:// does not allow.
    "mermaid": ["@mermaid-js/tiny/LICENSE", "@mermaid-js/tiny/dist/mermaid.tiny.js"],
    "fonts": [
        f"@fontsource-variable/{family}/files/{family}-{script}-{axis}-{style}.woff2"
        for family, axis, styles in [("source-serif-4", "opsz", ["normal", "italic"]), ("source-sans-3", "wght", ["normal", "italic"]),
                                     ("source-code-pro", "wght", ["normal", "italic"])]  # fmt: skip
        for script in ["latin", "latin-ext", "greek"]
        for style in styles
    ],
}


def npm_ci() -> None:
    "Install the packages of the lock file into `docs/node_modules`, unless they are there."
    lock = DOCS / "package-lock.json"
    installed = DOCS / "node_modules" / ".package-lock.json"  # npm writes it last, so it stands for a finished installation
    if installed.exists() and installed.stat().st_mtime >= lock.stat().st_mtime: return
    npm = shutil.which("npm")
    if npm is None: sys.exit("The site takes MathJax, mermaid and its fonts from npm: install Node.js (which brings npm) and try again.")
    subprocess.run([npm, "ci"], cwd=DOCS, check=True)
    installed.touch()


def copy_vendor(out: Path) -> None:
    "Copy what the site serves of `node_modules` to `out`; each pattern must match something."
    modules = DOCS / "node_modules"
    for folder, patterns in VENDOR.items():
        (out / folder).mkdir(parents=True, exist_ok=True)
        for pattern in patterns:
            files = sorted(modules.glob(pattern))
            if not files: sys.exit(f"docs/node_modules has no {pattern}: delete docs/node_modules and build again.")
            for file in files:
                target = out / folder / file.name
                if not target.exists() or target.stat().st_mtime < file.stat().st_mtime: shutil.copy2(file, target)


def fingerprint() -> str:
    "What a cached build depends on beside its sources: everything in this folder, and the versions installed."
    files = [p for p in sorted(DOCS.rglob("*")) if p.is_file() and not {"node_modules", "_build", "__pycache__"} & set(p.parts)]
    versions = sorted(f"{d.name} {d.version}" for d in importlib.metadata.distributions())
    return hashlib.sha256(b"".join(p.read_bytes() for p in files) + "\n".join(versions).encode()).hexdigest()


def layout() -> dict[str, Any]:
    "The parts of the book, as `_toc.yml` names them."
    return yaml.safe_load((DOCS / "_toc.yml").read_text(encoding="utf-8"))


def build(root: Path = DOCS.parent, out: Path = DOCS / "_build", npm: bool = True) -> int:
    """Build the site of the project in `root` into `out/html`; returns Sphinx's exit status.

    What Sphinx has read is kept in `out/doctrees`, but only after a build without a warning: a warning in a page that is not read again
    would be lost, and the second build would pass where the first one failed.
    """
    if npm: npm_ci()
    copy_vendor(out / "static" / "vendor")
    stage.write_sources(root, layout(), out / "source")
    stamp, doctrees = out / "clean-build", out / "doctrees"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != fingerprint(): shutil.rmtree(doctrees, ignore_errors=True)
    stamp.unlink(missing_ok=True)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-c", str(DOCS), "-d", str(doctrees)]
    # The project comes first on the path, so that the API pages show its package and no installed one.
    paths = [str(root), str(DOCS.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "LMBOOK_SITE_ROOT": str(root), "LMBOOK_SITE_OUT": str(out)}
    status = subprocess.run([*command, str(out / "source"), str(out / "html")], env=env, cwd=root).returncode
    if status == 0: stamp.write_text(fingerprint(), encoding="utf-8")
    return status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=DOCS.parent, help="the project (default: this one)")
    parser.add_argument("--out", type=Path, default=DOCS / "_build", help="where to build (default: docs/_build)")
    args = parser.parse_args()
    status = build(args.root.resolve(), args.out.resolve())
    if status == 0: print(f"the site is in {args.out / 'html'}: open {args.out / 'html' / 'index.html'} in a browser")
    sys.exit(status)


if __name__ == "__main__": main()
