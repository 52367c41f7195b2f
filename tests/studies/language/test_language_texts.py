"""The language study's texts: markup is removed, and no piece is both trained on and held out."""

import io
import tarfile

import pytest
import torch

from studies.language import texts
from studies.language.texts import plain_text, task_texts

PAGE = r"""'\" t
.\" Ein Kommentar
.TH LS 1 "Mai 2022"
.SH ÜBERSICHT
.B ls
[\fI\,OPTION\/\fP]...\& [\fIDATEI\fR]
.PP
Gro\(ss oder klein, \-\-all und \(lqalles\(rq, C:\eDaten.
"""


def test_the_text_of_a_page_without_its_markup():
    assert plain_text(PAGE) == 'ls [OPTION]... [DATEI] Gro oder klein, --all und "alles", C:\\Daten.'


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """Made-up pages, headers and sentences; a token is a character's number."""
    pages = [f"{chr(97 + k % 26)}{k}" * 600 for k in range(120)]
    monkeypatch.setattr(texts, "man_pages", lambda: iter(pages))
    monkeypatch.setattr(texts, "headers", lambda files: iter(page.upper().encode() for page in pages))
    monkeypatch.setattr(texts, "read_sentences", lambda archive: {"NYT": [(0.0, "A sentence of a newspaper.")] * 200})
    return pages


def tokenize(text):
    return [ord(letter) for letter in text]


def test_held_out_pieces_are_not_trained_on(sources, tmp_path):
    found = task_texts(tokenize, tmp_path, torch.zeros(32, 128, dtype=torch.long))
    for task, other in (("german", "cpp"), ("cpp", "german")):
        train, new = found[task].train, found[task].new
        assert (train.shape, new.shape) == ((1024, 128), (32, 128))
        trained, held_out = ("".join(map(chr, ids.flatten().tolist())) for ids in (train, new))
        for page in sources:
            words = page if task == "german" else page.upper()
            assert not (words[:300] in trained and words[:300] in held_out)
        assert torch.equal(found[task].kept["other"], found[other].new[:16])
        assert {name: len(ids) for name, ids in found[task].kept.items()} == {"prose": 16, "samples": 32, "other": 16}
    again = task_texts(tokenize, tmp_path, torch.zeros(32, 128, dtype=torch.long))
    assert again["german"].sha256() == found["german"].sha256() != found["cpp"].sha256()


def test_too_little_text_is_named(sources, monkeypatch, tmp_path):
    monkeypatch.setattr(texts, "headers", lambda files: iter([b"x" * 4000]))
    with pytest.raises(ValueError, match=r"C\+\+ headers: .* sequences of 128 tokens are needed; there are"):
        task_texts(tokenize, tmp_path, torch.zeros(32, 128, dtype=torch.long))


def package(tmp_path, pages):
    """A Debian package with these manual pages."""
    import gzip

    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as files:
        for name, page in pages.items():
            packed = gzip.compress(page.encode())
            member = tarfile.TarInfo(name)
            member.size = len(packed)
            files.addfile(member, io.BytesIO(packed))
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data.getvalue()}
    archive = b"!<arch>\n"
    for name, content in parts.items():
        archive += f"{name:16}{0:<12}{0:<6}{0:<6}{'100644':8}{len(content):<10}`\n".encode() + content
        archive += b"\n" * (len(content) % 2)
    path = tmp_path / "manpages-de_4.18.1-1_all.deb"
    path.write_bytes(archive)
    return path


def test_pages_of_a_package(tmp_path, monkeypatch):
    import hashlib

    monkeypatch.setenv("IPCA_STUDY_CACHE", str(tmp_path))
    names = ("./usr/share/man/de/man1/ls.1.gz", "./usr/share/man/de/man9/other.9.gz", "./usr/share/doc/readme.gz")
    path = package(tmp_path, {name: f"Eine Seite: {name}" for name in names})
    monkeypatch.setattr(texts, "MAN_PAGES", (texts.MAN_PAGES[0], hashlib.sha256(path.read_bytes()).hexdigest()))
    assert list(texts.man_pages()) == ["Eine Seite: ./usr/share/man/de/man1/ls.1.gz"]
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(ValueError, match=r"manpages-de_4\.18\.1-1_all\.deb is not the file of http"):
        list(texts.man_pages())
