"""Who calls: by token, or on this machine before there is one."""

import hmac
from datetime import timedelta

import pytest

from coordinator import auth
from coordinator.callers import FRESH_SECONDS, LOCAL, Caller, Callers
from coordinator.refusals import Refused
from coordinator.tokens import Role, StoredToken


class World:
    """A clock and a set of tokens that a test moves."""

    def __init__(self, noon, tokens_needed: bool = False) -> None:
        self.noon, self.seconds, self.tokens, self.reads = noon, 0.0, [], 0
        self.callers = Callers(self._read, lambda: self.noon, tokens_needed=tokens_needed, seconds=lambda: self.seconds)

    def _read(self):
        self.reads += 1
        return list(self.tokens)

    def add(self, name: str, role: Role = Role.SUBMITTER, **fields: object) -> str:
        token = auth.new_token()
        row = {"created": self.noon, "expires": None, "revoked": None, **fields}
        self.tokens.append(StoredToken(name, role, token.digest, **row))
        self.seconds += FRESH_SECONDS
        return token.secret

    def of(self, secret: str | None) -> Caller:
        return self.callers.of([] if secret is None else [("authorization", f"Bearer {secret}")])

    def refusal(self, secret: str | None) -> str:
        with pytest.raises(Refused) as refused:
            self.of(secret)
        assert not secret or secret not in refused.value.message
        return refused.value.reason


def test_before_the_first_token_everybody_here_is_the_administrator(noon) -> None:
    assert World(noon).of(None) == LOCAL


def test_where_others_can_reach_it_nobody_is_let_in_without_a_token_even_before_the_first(noon) -> None:
    assert World(noon, tokens_needed=True).refusal(None) == "TokenMissing"


def test_from_the_first_token_on_a_token_is_asked_for_even_when_all_are_revoked(noon) -> None:
    world = World(noon)
    world.add("ada", revoked=noon)
    assert world.refusal(None) == "TokenMissing"


def test_a_token_says_who_calls_and_in_which_role(noon) -> None:
    world = World(noon)
    ada, bob = world.add("ada"), world.add("bob", Role.VIEWER)
    assert (world.of(ada), world.of(bob)) == (Caller("ada", Role.SUBMITTER), Caller("bob", Role.VIEWER))


@pytest.mark.parametrize("fields", [{"revoked": True}, {"expires": True}])
def test_a_token_is_good_until_it_is_revoked_or_its_time_is_over(noon, fields) -> None:
    world = World(noon)
    secret = world.add("ada", **{name: noon + timedelta(seconds=1) for name in fields if name == "expires"})
    assert world.of(secret).name == "ada"
    if "revoked" in fields:
        world.tokens = [token._replace(revoked=noon) for token in world.tokens]
        world.seconds += FRESH_SECONDS
    world.noon += timedelta(seconds=1)
    assert world.refusal(secret) == "TokenNotGood"


@pytest.mark.parametrize("offered", ["guessed", "", "é" * 43, "x" * 100_000])
def test_a_token_that_is_shown_must_be_good_asked_for_or_not(noon, offered) -> None:
    world = World(noon)
    if offered:
        assert world.refusal(offered) == "TokenNotGood"
    world.add("ada")
    assert world.refusal(offered) in ("TokenNotGood", "TokenMissing")


def test_tokens_are_read_once_a_second_however_many_calls_come(noon) -> None:
    world = World(noon)
    for _ in range(10):
        world.of(None)
    assert world.reads == 1
    world.seconds += FRESH_SECONDS
    world.of(None)
    assert world.reads == 2


def test_every_stored_digest_is_compared_in_constant_time_whichever_fits(noon, monkeypatch) -> None:
    world = World(noon)
    secrets = [world.add(name) for name in ("ada", "bob", "eve")]
    compared: list[str] = []

    def compare(stored: str, offered: str) -> bool:
        compared.append(stored)
        return real(stored, offered)

    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare)
    for secret in secrets:
        assert world.of(secret)
        assert compared == [token.digest for token in world.tokens]
        compared.clear()
    world.refusal("guessed")
    assert compared == [token.digest for token in world.tokens]
