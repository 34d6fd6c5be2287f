import pytest

from everlong.errors import ConfigurationError, UnknownNameError
from everlong.models.catalogue import CATALOGUE, DEFAULT_MODEL, CatalogueEntry


def test_the_default_model_needs_no_acceptance():
    assert CATALOGUE[DEFAULT_MODEL].terms is None


@pytest.mark.parametrize("name", list(CATALOGUE))
def test_every_entry_names_pinned_files_with_checksums(name):
    entry = CATALOGUE[name]
    files = [*entry.parts, *entry.documents, *([entry.terms.document] if entry.terms else [])]
    assert entry.name == name
    assert all(len(checksum) == 64 for checksum in [entry.sha256, *(file.sha256 for file in files)])
    assert all(file.version and file.size > 0 and file.wheel_size > 0 for file in files)


@pytest.mark.parametrize("name", list(CATALOGUE))
def test_file_names_are_bare_names(name):
    entry = CATALOGUE[name]
    for file in (entry.gguf, *(part.name for part in entry.parts)):
        assert "/" not in file and "\\" not in file and not file.startswith(".")


def test_a_model_of_one_part_has_that_parts_checksum():
    entry = CATALOGUE["smollm2-135m"]
    assert entry.sha256 == entry.parts[0].sha256
    assert entry.size == entry.parts[0].size


def test_an_unknown_name_is_answered_with_near_ones():
    with pytest.raises(UnknownNameError, match="did you mean 'smollm2-135m'"):
        CATALOGUE["smollm2"]


def test_an_entry_without_parts_is_refused():
    with pytest.raises(ConfigurationError, match="no parts"):
        CatalogueEntry("x", "X", (), "x.gguf", "0", 1, "MIT", 1, False, False, "")
