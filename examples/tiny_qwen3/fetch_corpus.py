"""Download the Debian packages that hold the training text and unpack them (nothing is installed).

Packages already unpacked are skipped, so the script can be stopped and started again at any time. It needs `apt-get`
with up-to-date package lists and `dpkg-deb`, that is any Debian or Ubuntu system or container.

    python fetch_corpus.py --work work
"""

import argparse
import json
import subprocess
from pathlib import Path

HELP_LANGUAGES = ["en-us", "zh-cn", "ru", "ko", "ja", "de", "fr", "es", "it", "pl", "pt", "vi", "nl", "tr", "cs"]
PACKAGES = [
    *(f"libreoffice-help-{language}" for language in HELP_LANGUAGES),
    "debian-reference-en",
    "debian-reference-zh-cn",
    "debian-handbook",
    "installation-guide-amd64",
    "manpages",
    "manpages-dev",
    "manpages-zh",
    "manpages-ru",
    "gimp-help-en",
    "gimp-help-zh-cn",
    "gimp-help-ko",
    "gimp-help-ru",
    "gnome-user-docs",
    "developers-reference",
    "debian-policy",
    "maint-guide",
]


def archive_of(package: str, work: Path) -> Path:
    """Return the downloaded file of `package`."""
    return next((work / "deb").glob(f"{package}_*.deb"))


def fetch(package: str, work: Path) -> None:
    """Download `package` into `work/deb` and unpack it into `work/packages/<package>`."""
    target = work / "packages" / package
    if target.is_dir():
        return
    downloads = work / "deb"
    downloads.mkdir(parents=True, exist_ok=True)
    if not list(downloads.glob(f"{package}_*.deb")):
        subprocess.run(["apt-get", "download", package], cwd=downloads, check=True)
    archive = archive_of(package, work)
    partial = target.with_name(package + ".partial")
    subprocess.run(["dpkg-deb", "-x", str(archive), str(partial)], check=True)
    partial.rename(target)  # a folder under its final name is complete


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work", help="folder for all working data")
    arguments = parser.parse_args()
    (arguments.work / "packages").mkdir(parents=True, exist_ok=True)
    versions: dict[str, dict[str, str | int]] = {}
    for package in PACKAGES:
        fetch(package, arguments.work)
        archive = archive_of(package, arguments.work)
        field = subprocess.run(["dpkg-deb", "-f", str(archive), "Version"], check=True, capture_output=True, text=True)
        versions[package] = {"version": field.stdout.strip(), "bytes": archive.stat().st_size}
        print(package, versions[package], flush=True)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "packages.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
