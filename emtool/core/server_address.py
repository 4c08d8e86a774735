"""Addresses of model servers, and which key each may be sent."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from emtool.core.errors import ConfigError

OPENAI_URL = "https://api.openai.com/v1"
OPENAI_KEY_VARIABLE = "OPENAI_API_KEY"
#: Environment variable that holds the key of a judge's server other than OpenAI's.
JUDGE_KEY_VARIABLE = "EMTOOL_JUDGE_API_KEY"

_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, kw_only=True)
class ServerAddress:
    """The base URL of a server that speaks the OpenAI protocol, in normal form.

    Attributes:
        scheme: "http" or "https".
        host: Name or IP address in lower case, an IPv6 one without brackets.
        port: Port; None where it is the scheme's own.
        path: Path without a slash at its end; may be empty.
    """

    scheme: str
    host: str
    port: int | None
    path: str

    @property
    def url(self) -> str:
        """Return the base URL: no user, no key, no query, no slash at the end."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port is None else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.path}"

    @property
    def is_openai(self) -> bool:
        """Return whether this is OpenAI's own service, the only one that its key is sent to."""
        return (self.scheme, self.host, self.port) == ("https", "api.openai.com", None)

    @property
    def is_loopback(self) -> bool:
        """Return whether the server is on this machine."""
        address = self._ip_address()
        return self.host == "localhost" if address is None else address.is_loopback

    @property
    def is_local(self) -> bool:
        """Return whether the server is on this machine or in a private network."""
        address = self._ip_address()
        return self.is_loopback or (address is not None and address.is_private and not address.is_unspecified)

    def _ip_address(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
        try:
            return ipaddress.ip_address(self.host)
        except ValueError:
            return None


@dataclass(frozen=True, kw_only=True)
class ServerKey:
    """A key for a server. Its text shows neither as `str` nor as `repr`.

    Attributes:
        variable: The environment variable that it is read from.
        value: The key; None where the variable is not set and the server may need none.
    """

    variable: str
    value: str | None

    def __repr__(self) -> str:
        return f"ServerKey(variable={self.variable!r}, is_set={self.value is not None})"


def parse_address(url: str | None) -> ServerAddress:
    """Return the address of a base URL; None is OpenAI's.

    Raises:
        ConfigError: If it is not an http or https URL, or holds a user, a query or a fragment.
    """
    text = OPENAI_URL if url is None else url.strip()
    try:
        parts = urlsplit(text)
        port = parts.port
        host = (parts.hostname or "").encode("idna" if not (parts.hostname or "").isascii() else "ascii").decode()
    except ValueError as error:
        raise ConfigError(
            f"a server's base URL cannot be read: {error}; give one like http://localhost:8000/v1"
        ) from None
    if "@" in parts.netloc:
        raise ConfigError(
            f"the base URL of {host or 'a server'} holds a user or a key, which would be stored; leave it out and set "
            "the key in the environment"
        )
    if parts.scheme not in _DEFAULT_PORTS or not host or not text.isprintable() or " " in text or "%" in host:
        raise ConfigError(f"{text!r} is no base URL of a server; give one like http://localhost:8000/v1")
    if parts.query or parts.fragment:
        raise ConfigError(f"the base URL of {host} ends in a query or a fragment; leave it out")
    own_port = None if port == _DEFAULT_PORTS[parts.scheme] else port
    return ServerAddress(scheme=parts.scheme, host=host.lower(), port=own_port, path=parts.path.rstrip("/"))


def read_key(address: ServerAddress, *, variable: str, environment: Mapping[str, str]) -> ServerKey:
    """Return the key for a server. OpenAI's key goes to OpenAI alone.

    Args:
        address: The server.
        variable: Environment variable that holds the key for any other server than OpenAI's.
        environment: The environment.

    Raises:
        ConfigError: If OpenAI's key is not set, or a key cannot be sent in a header.
    """
    name = OPENAI_KEY_VARIABLE if address.is_openai else variable
    value = environment.get(name, "").strip()
    if address.is_openai and not value:
        raise ConfigError(
            f"{address.url} needs a key: set {name} in the environment, or give the URL of another server"
        )
    if not value.isascii() or not value.isprintable() or " " in value:
        raise ConfigError(f"the key in {name} holds characters that no key has; set it again")
    return ServerKey(variable=name, value=value or None)
