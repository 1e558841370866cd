"""Start JupyterLab on the first chapter, on whatever machine this is: what `make lab` calls.

A desktop gets a browser; a machine without a display, CI and SSH get the address only. Root and a home folder that cannot be written are no
obstacle, as in a container. `LAB_IP` and `LAB_PORT` name another address to listen on; further arguments are JupyterLab's own
(`jupyter lab --help`). The token always stays.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import webbrowser
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent / "nbs"
FIRST = "00_tour.ipynb"
TEXT_BROWSERS = {"www-browser", "links", "elinks", "lynx", "w3m"}  # these would take over the terminal in which the server runs
WILDCARDS = {"", "*", "0.0.0.0", "::"}  # all interfaces: an address to listen on, but none to go to


def is_root() -> bool:
    "Whether JupyterLab would refuse to start without --allow-root. (Windows has no such user.)"
    return hasattr(os, "geteuid") and os.geteuid() == 0


def in_container(root: Path = Path("/"), env: Mapping[str, str] = os.environ) -> bool:
    "Whether this runs in a container: by the files that Docker and Podman leave, systemd's variable, or the name of the control group."
    if env.get("container") or any((root / mark).exists() for mark in (".dockerenv", "run/.containerenv")): return True
    try: groups = (root / "proc/1/cgroup").read_text(encoding="utf-8")
    except OSError: return False
    return any(name in groups for name in ("docker", "kubepods", "containerd", "libpod", "lxc"))


def opens_browser(env: Mapping[str, str] = os.environ, platform: str = sys.platform) -> bool:
    "Whether somebody sits in front of this machine who would see a browser, and the browser has a window of its own."
    if env.get("CI") or env.get("SSH_CONNECTION") or env.get("SSH_TTY"): return False
    if platform in ("darwin", "win32"): return True
    if not (env.get("DISPLAY") or env.get("WAYLAND_DISPLAY")): return False
    try: return Path(getattr(webbrowser.get(), "name", "")).name not in TEXT_BROWSERS
    except webbrowser.Error: return False


def home_works() -> bool:
    "Whether Jupyter can write what it keeps in the home folder; otherwise it ends in a traceback."
    from jupyter_core.paths import jupyter_config_dir, jupyter_data_dir, jupyter_runtime_dir

    try:
        for folder in (jupyter_config_dir(), jupyter_data_dir(), jupyter_runtime_dir()):
            os.makedirs(folder, mode=0o700, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder): pass
    except (OSError, RuntimeError): return False  # RuntimeError: a user without a home, as with `docker run --user`
    return True


def arguments(env: Mapping[str, str] = os.environ) -> list[str]:
    "JupyterLab's command line for this machine."
    args = [f"--ServerApp.root_dir={NBS}", f"--LabApp.default_url=/lab/tree/{FIRST}"]
    args += [f"--ServerApp.{name}={env[variable]}" for name, variable in (("ip", "LAB_IP"), ("port", "LAB_PORT")) if env.get(variable)]
    return args + ["--allow-root"] * is_root() + ["--no-browser"] * (not opens_browser(env))


def say(line: str) -> None:
    "Print at once, also into a pipe or a container's log."
    print(line, flush=True)


def serve(args: list[str]) -> None:
    "Run JupyterLab until it is stopped. It is one process, so that signals, the terminal and the exit status are JupyterLab's own."
    from jupyterlab.labapp import LabApp
    from traitlets.config import Config

    # Quiet, unless an argument or the user's own configuration says otherwise: the address is not to be searched for among other lines.
    server = LabApp.initialize_server(argv=args, config=Config(Application={"log_level": "WARN"}))
    wanted = int(server.config.ServerApp.get("port", os.environ.get(server.port_env, server.port_default_value)))
    local = server.ip not in WILDCARDS
    address = server.public_url if local else server.local_url
    server.identity_provider.token_generated = False  # otherwise JupyterLab prints the address again, among other lines
    lines = [f"\nThe book: {address}", "To stop it: Ctrl-C, then y (or Ctrl-C twice)."]
    if wanted not in (0, server.port): lines.insert(0, f"Port {wanted} is taken: this is {server.port}.")
    if in_container() and local:
        published = f"docker run -p {server.port}:{server.port}, and LAB_IP=0.0.0.0 make lab"
        lines.append(f"In a container: reached only from inside it. From outside: {published}.")
    server.io_loop.add_callback(say, "\n".join(lines))  # when it listens, after all that it has to say itself
    server.start()


def main(argv: list[str] | None = None) -> None:
    "Say in a line what is unusual here, and serve."
    parser = argparse.ArgumentParser("python -m tools.lab", allow_abbrev=False, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    rest = parser.parse_known_args(argv)[1]
    if is_root(): say(f"Running as root{', as in a container' * in_container()}: JupyterLab is started with --allow-root.")
    with ExitStack() as stack:
        if not home_works():
            say(f"The home folder ({os.environ.get('HOME', 'none')}) cannot be written: a temporary one is used; settings are not kept.")
            os.environ["HOME"] = stack.enter_context(tempfile.TemporaryDirectory(prefix="lmbook-home-", ignore_cleanup_errors=True))
        try: serve(arguments() + rest)
        except KeyboardInterrupt: sys.exit(130)  # while it was starting


if __name__ == "__main__": main()
