"""Who calls: keys from a file, each with the adapters it may use; without a file, programs on this machine."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import hmac
import ipaddress
import json
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from rankwise.errors import OptionError
from rankwise.serve.http.errors import Refusal


class Access(Enum):
    """Who may call a route."""

    OPEN = "open"
    CLIENT = "client"
    METRICS = "metrics"
    ADMIN = "admin"


@dataclasses.dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is.

    Attributes:
        name: the key's name, which is the tenant; "" for programs on this machine where there are no keys.
        adapters: names, or patterns with ``*``, of the adapters it may use; ``base``: whether it may use the base.
        admin, metrics: may load and unload; may read /metrics.
    """

    name: str = ""
    adapters: tuple[str, ...] = ("*",)
    base: bool = True
    admin: bool = False
    metrics: bool = False

    def may(self, adapter: str | None) -> bool:
        """Whether it may use an adapter, None for the base."""
        return self.base if adapter is None else any(fnmatch.fnmatchcase(adapter, p) for p in self.adapters)

    def has(self, access: Access) -> bool:
        return self.admin or access in (Access.OPEN, Access.CLIENT) or (access is Access.METRICS and self.metrics)


class _Key(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    key: str | None = Field(None, min_length=16)
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    adapters: list[str] = ["*"]
    base: bool = True
    admin: bool = False
    metrics: bool = False


class _KeyFile(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    keys: list[_Key] = Field(min_length=1)


class Keys:
    """The keys of a server; without any, only programs on this machine are served, as administrators."""

    def __init__(self, known: Sequence[tuple[bytes, Caller]] = ()):
        self._known = tuple(known)

    @classmethod
    def read(cls, path: Path) -> Keys:
        """From a JSON file: ``{"keys": [{"name", "key" or "sha256", "adapters", "base", "admin", "metrics"}]}``.

        Raises:
            OptionError: the file is missing or wrong; the message never holds a key.
        """
        try:
            file = _KeyFile.model_validate(json.loads(path.read_text("utf-8")))
        except OSError as error:
            raise OptionError(f"The key file {path} cannot be read: {error.strerror}.") from None
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(str(p) for p in first["loc"])
            raise OptionError(f"The key file {path} is wrong at {place}: {first['msg']}.") from None
        except ValueError as error:
            raise OptionError(f"The key file {path} is not JSON: {str(error).splitlines()[0]}.") from None
        known = [(_digest(k, path), Caller(k.name, tuple(k.adapters), k.base, k.admin, k.metrics)) for k in file.keys]
        for values, what in (([c.name for _, c in known], "name"), ([d for d, _ in known], "key")):
            if len(set(values)) < len(values):
                raise OptionError(f"The key file {path} has two entries of the same {what}; each is given once.")
        return cls(known)

    def __bool__(self) -> bool:
        return bool(self._known)

    def admit(self, request: Request, access: Access) -> Caller:
        """The caller of a request, if the route is open to it.

        Raises:
            Refusal: 401 (no or a wrong key), 403 (a key without this right; a foreign web page or machine, without keys).
        """
        if access is Access.OPEN:
            return Caller()
        caller = self._caller(request.headers.get("authorization", "")) if self._known else _local(request)
        if not caller.has(access):
            raise Refusal(403, "permission_denied", f"The key {caller.name!r} has no {access.value} right, which this route needs.")
        return caller

    def _caller(self, header: str) -> Caller:
        scheme, _, key = header.partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for digest, caller in self._known:  # all of them, so that the time says nothing of where it was found
            if hmac.compare_digest(digest, given):
                found = caller
        if scheme.lower() != "bearer" or found is None:
            message = "This server needs a key: send 'Authorization: Bearer KEY'." if not key else "The key is not known here."
            raise Refusal(401, "invalid_api_key", message)
        return found


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def _digest(key: _Key, path: Path) -> bytes:
    if (key.key is None) == (key.sha256 is None):
        raise OptionError(f"The key file {path}: entry {key.name!r} has either 'key' or 'sha256'.")
    return hashlib.sha256(key.key.encode()).digest() if key.key is not None else bytes.fromhex(key.sha256 or "")


def _local(request: Request) -> Caller:
    """Without keys: this machine only, and no web page that a browser here happens to show.

    A page's own origin gives it away, or, after a name was rebound to this address, the host that it asked for.
    """
    if request.client is None or not is_loopback(request.client.host):
        raise Refusal(403, "permission_denied", "Without keys this server answers its own machine only; start it with --api-keys.")
    origin = request.headers.get("origin")
    hosts = [urlsplit("//" + request.headers.get("host", "")).hostname, urlsplit(origin).hostname if origin else "localhost"]
    if not all(h and is_loopback(h) for h in hosts):
        raise Refusal(403, "permission_denied", "Without keys this server answers under its own address only, and no web pages.")
    return Caller(admin=True)
