"""The coordinator's certificate: what is accepted, what is said of the rest, and that a change is taken up."""

import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from coordinator.certificates import Certificates, CertificateUnusable, TlsFiles
from tests.authority import Authority, Pair


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def test_the_name_is_one_the_certificate_is_good_for(authority) -> None:
    assert Certificates(TlsFiles(*authority.issue(hosts=("127.0.0.1",)))).name == "127.0.0.1"
    assert Certificates(TlsFiles(*authority.issue(hosts=("*.example.org", "::1")))).name == "any.example.org"


def test_a_changed_pair_is_taken_up_once_and_a_broken_one_is_not(authority, caplog) -> None:
    pair = authority.issue("changing", hosts=("one.example.org",))
    certificates = Certificates(TlsFiles(*pair))
    assert not certificates.refresh()
    authority.issue("changing", hosts=("two.example.org",))
    assert certificates.refresh()
    assert not certificates.refresh()
    assert certificates.name == "two.example.org"
    other = authority.issue("other", hosts=("three.example.org",))
    os.replace(other.certificate, pair.certificate)  # its key comes a moment later
    assert not certificates.refresh()
    assert certificates.name == "two.example.org"
    assert "are not of one pair" in caplog.text
    os.replace(other.key, pair.key)
    assert certificates.refresh()
    assert certificates.name == "three.example.org"
    pair.key.unlink()
    assert not certificates.refresh()
    assert certificates.name == "three.example.org"


def _not_there(authority: Authority) -> TlsFiles:
    return TlsFiles(Path("/not/there.pem"), authority.issue().key)


def _two_pairs(authority: Authority) -> TlsFiles:
    return TlsFiles(authority.issue("one").certificate, authority.issue("two").key)


def _no_pem(authority: Authority) -> TlsFiles:
    return TlsFiles(Path(__file__), authority.issue().key)


def _over(authority: Authority) -> TlsFiles:
    return TlsFiles(*authority.issue("over", days=-1))


def _nameless(authority: Authority) -> TlsFiles:
    return TlsFiles(*authority.issue("nameless", hosts=()))


def _stranger_to_its_own_clients_ca(authority: Authority) -> TlsFiles:
    pair = authority.issue("mine")
    return TlsFiles(*pair, Authority(pair.key.parent, "another").ca)


def _for_servers_alone(authority: Authority) -> TlsFiles:
    return TlsFiles(*authority.issue("server-only", client=False), authority.ca)


def _encrypted(authority: Authority) -> TlsFiles:
    pair = authority.issue("encrypted")
    key = serialization.load_pem_private_key(pair.key.read_bytes(), None)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    pair.key.write_bytes(key.private_bytes(*form, serialization.BestAvailableEncryption(b"word")))
    return TlsFiles(*pair)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_not_there, "/not/there.pem: cannot be read: No such file"),
        (_two_pairs, "are not of one pair"),
        (_no_pem, "are not both PEM files"),
        (_over, "certificate has expired"),
        (_nameless, "names no host for clients to check"),
        (_stranger_to_its_own_clients_ca, "another.pem must vouch for it"),
        (_for_servers_alone, "must vouch for it"),
        (_encrypted, "is encrypted"),
    ],
)
def test_files_that_cannot_be_used_are_named_in_one_line(authority, make, words) -> None:
    with pytest.raises(CertificateUnusable, match=words) as fault:
        Certificates(make(authority))
    assert len(str(fault.value).splitlines()) == 1


def test_no_key_is_in_a_message_or_a_name(authority) -> None:
    pair: Pair = authority.issue()
    assert "PRIVATE" not in repr(Certificates(TlsFiles(*pair)).files)
