import pytest

from emtool.core.errors import ConfigError
from emtool.core.server_address import parse_address, read_key


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        (None, "https://api.openai.com/v1"),
        (" HTTPS://API.OpenAI.com:443/v1/ ", "https://api.openai.com/v1"),
        ("http://localhost:8000", "http://localhost:8000"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
        ("https://bücher.example/v1", "https://xn--bcher-kva.example/v1"),
    ],
)
def test_a_base_url_has_one_normal_form(url: str | None, normal: str) -> None:
    address = parse_address(url)
    assert address.url == normal
    assert parse_address(normal) == address


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "ftp://host/v1",
        "file:///etc/passwd",
        "http://",
        "http://host:99999/v1",
        "http://[::1/v1",
        "http://host/v1?key=1",
        "http://host/v1#a",
        "http://ho st/v1",
        "http://host/\nv1",
        "http://%41/v1",
        "http://\x00/",
    ],
)
def test_what_is_no_base_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_address(url)
    assert "\n" not in str(caught.value)


def test_a_user_in_a_url_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="holds a user or a key") as caught:
        parse_address("https://me:sk-secret@host/v1")
    assert "sk-secret" not in str(caught.value)


def test_which_servers_are_local() -> None:
    local = ("http://localhost", "http://127.0.0.5", "http://192.168.0.2", "http://[fd00::1]", "http://[::1]")
    assert all(parse_address(url).is_local for url in local)
    assert [parse_address(url).is_loopback for url in local] == [True, True, False, False, True]
    far = (
        "https://api.openai.com/v1",
        "http://8.8.8.8",
        "http://localhost.example.org",
        "http://127.0.0.1.example.org",
    )
    assert not any(parse_address(url).is_local for url in far)


def test_openais_key_goes_to_openai_alone() -> None:
    environment = {"OPENAI_API_KEY": "sk-openai", "EMTOOL_JUDGE_API_KEY": "other"}

    def key(url: str | None, **changes: str) -> str | None:
        given = {**environment, **changes}
        return read_key(parse_address(url), variable="EMTOOL_JUDGE_API_KEY", environment=given).value

    assert key(None) == "sk-openai"
    near = ("http://api.openai.com/v1", "https://api.openai.com:8443/v1", "https://api.openai.com.example.org/v1")
    for url in (*near, "http://localhost:8000/v1"):
        assert key(url) == "other"
        assert key(url, EMTOOL_JUDGE_API_KEY="") is None
    with pytest.raises(ConfigError, match="set OPENAI_API_KEY"):
        key(None, OPENAI_API_KEY=" ")


@pytest.mark.parametrize("key", ["sk-a b", "sk-\n1", "sk-é", "sk-\x00"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_key(parse_address(None), variable="X", environment={"OPENAI_API_KEY": key})
    assert "sk-" not in str(caught.value)


def test_a_key_does_not_show() -> None:
    key = read_key(parse_address(None), variable="X", environment={"OPENAI_API_KEY": "sk-secret"})
    assert "sk-secret" not in f"{key} {key!r}"
