"""Fetching an image from a URL that a stranger names, without reaching what only this machine should reach.

Hosts must be on a list. Their addresses are checked after they are resolved, and the connection goes to an address that
was checked: a second look-up, which may answer otherwise, is never made. Redirects are followed as new URLs.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus

import httpx

from deployments.web.problems import Problem

MAX_REDIRECTS = 3
PORTS = {"http": 80, "https": 443}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


async def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of a host. Raises `OSError`."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def is_public(text: str) -> bool:
    """Whether an address is one of the open internet, and so is each that it wraps."""
    try:
        address: Address = ipaddress.ip_address(text)
    except ValueError:
        return False  # such as one with a zone, which is link-local
    if isinstance(address, ipaddress.IPv6Address):
        wrapped = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            wrapped.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if not all(one is None or is_public(str(one)) for one in wrapped):
            return False
        if address.ipv4_mapped:
            return True
    return address.is_global and not address.is_multicast


@dataclass(frozen=True, kw_only=True)
class Fetcher:
    """Fetches from `hosts` alone: names, `*.name` for what is below one, `name:port` for a port other than usual."""

    hosts: Sequence[str]
    max_bytes: int
    timeout_s: float
    resolve: Resolve = field(default=resolve)
    is_allowed: Callable[[str], bool] = field(default=is_public)

    async def fetch(self, url: str) -> bytes:
        """The body behind the URL. Raises `Problem`."""
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._follow(url)
        except TimeoutError as error:
            detail = f"the image did not come within {self.timeout_s:g} s"
            raise Problem(HTTPStatus.GATEWAY_TIMEOUT, detail) from error

    async def _follow(self, url: str) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            found = await self._one(url)
            if isinstance(found, bytes):
                return found
            url = found
        raise _refused(f"it is redirected more than {MAX_REDIRECTS} times")

    async def _one(self, url: str) -> bytes | str:
        """The body, or the URL that it is said to be at."""
        target = self._checked(url)
        pinned = target.copy_with(host=await self._address(target))
        # of the environment nothing: a proxy would resolve the name again
        async with httpx.AsyncClient(trust_env=False, timeout=self.timeout_s) as client:
            request = client.build_request(
                "GET",
                pinned,
                headers={"host": target.netloc.decode(), "accept": "image/*", "accept-encoding": "identity"},
                extensions={"sni_hostname": target.host},
            )
            try:
                response = await client.send(request, stream=True)
                try:
                    return await self._taken(response, target)
                finally:
                    await response.aclose()
            except httpx.HTTPError as error:
                raise _refused(f"{target.host} does not answer: {type(error).__name__}") from error

    async def _taken(self, response: httpx.Response, target: httpx.URL) -> bytes | str:
        if response.has_redirect_location:
            return str(target.join(response.headers["location"]))
        if response.status_code != HTTPStatus.OK:
            raise _refused(f"{target.host} answers {response.status_code}")
        body = bytearray()
        async for part in response.aiter_raw():
            body += part
            if len(body) > self.max_bytes:
                detail = f"the image has more than {self.max_bytes} bytes"
                raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail)
        return bytes(body)

    def _checked(self, text: str) -> httpx.URL:
        try:
            url = httpx.URL(text)
        except (httpx.InvalidURL, ValueError) as error:
            raise _refused(f"it is no URL: {error}") from error
        if url.scheme not in PORTS:
            raise _refused("it must begin with http:// or https://")
        if url.userinfo:
            raise _refused("it holds a user or a password")
        if not self._listed(url):
            raise _refused(f"the host {url.host!r} is not on this endpoint's list")
        return url

    def _listed(self, url: httpx.URL) -> bool:
        port = "" if url.port in (None, PORTS[url.scheme]) else f":{url.port}"
        name = f"{url.host.lower().rstrip('.')}{port}"
        return any(
            name.endswith(host[1:].lower()) if host.startswith("*.") else name == host.lower() for host in self.hosts
        )

    async def _address(self, url: httpx.URL) -> str:
        """An address of the URL's host, all of whose addresses are allowed."""
        try:
            addresses = await self.resolve(url.host, url.port or PORTS[url.scheme])
        except OSError as error:
            raise _refused(f"the host {url.host!r} is not known") from error
        if not addresses or not all(map(self.is_allowed, addresses)):
            raise _refused(f"the host {url.host!r} has an address that is not public")
        return addresses[0]


def _refused(why: str) -> Problem:
    return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, f"image_url: {why}")
