"""One picture from one URL: attempts, redirects by hand, and what each answer and each error means."""

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import aiohttp
from yarl import URL

from mlip_cli.data.download.addresses import Address, read_address
from mlip_cli.data.download.body import Budget, read_body
from mlip_cli.data.download.failure import DownloadError
from mlip_cli.data.download.headers import opt_out, seconds_of
from mlip_cli.data.download.hosts import LONGEST_WAIT_S, Host, Hosts
from mlip_cli.data.download.names import CheckedResolver, LookUp
from mlip_cli.data.download.options import CONNECT_SHARE, LONGEST_CONNECT_S, MAX_REDIRECTS, DownloadOptions
from mlip_cli.data.download.outcome import (
    ASKED_TO_WAIT,
    BAD_ANSWER,
    CIRCLE,
    CONNECTION_FAILED,
    CUT_OFF,
    NO_CERTIFICATE,
    OPTED_OUT,
    RETRIED_STATUSES,
    TIMED_OUT,
    TOO_MANY_REDIRECTS,
    status_words,
)

REDIRECTS = (301, 302, 303, 307, 308)
FOUND = (200, 203)
FIRST_DELAY_S = 1.0
"""Before the second attempt, on average; each later delay is twice as long."""
LONGEST_SHOWN = 300
"""Characters of where a redirect leads to."""
IDLE_S = 5.0
"""A connection stays open for the next row of its host so long."""


@dataclass
class Remaining:
    """What is left of the time of an attempt."""

    seconds: float


class Fetcher:
    """Fetches pictures in the running event loop."""

    def __init__(self, options: DownloadOptions, *, lookup: LookUp) -> None:
        self.options = options
        self.budget = Budget(options.max_held_bytes)
        self._hosts = Hosts(options.connections_per_host, asyncio.Semaphore(options.connections))
        self._connect_s = min(LONGEST_CONNECT_S, CONNECT_SHARE * options.timeout_s)
        # No proxy and no .netrc of the environment: a proxy would ask DNS itself, behind the check of the addresses.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=CheckedResolver(lookup, allow_private=options.allow_private),
                use_dns_cache=False,  # the resolver has one that is bounded
                limit=0,  # Hosts counts them
                keepalive_timeout=IDLE_S,
            ),
            timeout=aiohttp.ClientTimeout(total=None, connect=self._connect_s),
            headers={"User-Agent": options.user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def fetch(self, url: str) -> bytes:
        """The bytes at `url`; they stay in `budget` until its `give`.

        Raises:
            DownloadError: there is no picture, after all attempts.
        """
        address = read_address(url, allow_private=self.options.allow_private)
        delay_s = FIRST_DELAY_S
        for left in reversed(range(self.options.retries + 1)):
            try:
                return await self._attempt(address)
            except DownloadError as error:
                if not left or not error.is_retried:
                    raise
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.5))
            delay_s *= 2
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, address: Address) -> bytes:
        """Ask, and follow redirects."""
        remaining = Remaining(self.options.timeout_s)
        seen = [address.url]
        while isinstance(answer := await self._ask(address, remaining), str):
            try:
                address = read_address(answer, base=address.url, allow_private=self.options.allow_private)
            except DownloadError as error:
                raise DownloadError(error.reason, f"redirect to {answer[:LONGEST_SHOWN]}: {error.detail}") from None
            if address.url in seen:
                raise DownloadError(CIRCLE, f"{' -> '.join([*seen[1:], address.url])}")
            seen.append(address.url)
            if len(seen) > MAX_REDIRECTS + 1:
                raise DownloadError(TOO_MANY_REDIRECTS, f"more than {MAX_REDIRECTS}, the last to {address.url}")
        return answer

    async def _ask(self, address: Address, remaining: Remaining) -> bytes | str:
        """The bytes of an answer, or where it redirects to."""
        async with self._hosts.turn(address.host) as host:
            await self.budget.room()
            loop = asyncio.get_running_loop()
            started = loop.time()
            with self._errors_named(host):
                async with (
                    asyncio.timeout(remaining.seconds) as deadline,
                    self._session.get(URL(address.url, encoded=True), allow_redirects=False) as response,
                ):
                    if response.status in REDIRECTS and (location := response.headers.get("Location")):
                        host.answered()
                        remaining.seconds -= loop.time() - started
                        return location
                    self._check_headers(response, host)
                    return await read_body(
                        response, max_bytes=self.options.max_bytes, budget=self.budget, deadline=deadline
                    )

    def _check_headers(self, response: aiohttp.ClientResponse, host: Host) -> None:
        """Refuse an answer that is not that of a picture.

        Raises:
            DownloadError: by its status, or because the owner keeps it out.
        """
        status, headers = response.status, response.headers
        if status not in FOUND:
            wait_s = seconds_of(headers.get("Retry-After"))
            if status in (429, 503) and wait_s is not None:
                host.pause(wait_s)
                if wait_s > LONGEST_WAIT_S:
                    raise DownloadError(ASKED_TO_WAIT, f"status {status}, Retry-After: {headers['Retry-After']}")
            elif status != 429:
                host.answered()
            raise DownloadError(status_words(status), f"status {status}", is_retried=status in RETRIED_STATUSES)
        host.answered()
        tags = headers.getall("X-Robots-Tag", [])
        wish = opt_out(tags, headers.get("TDM-Reservation"), user_agent=self.options.user_agent)
        if wish and not self.options.ignore_opt_out:
            raise DownloadError(OPTED_OUT, wish)

    @contextmanager
    def _errors_named(self, host: Host) -> Iterator[None]:
        """Turn what aiohttp raises into a DownloadError."""
        try:
            yield
            host.was_whole()
        except DownloadError:
            host.was_whole()
            raise
        except aiohttp.ConnectionTimeoutError:
            words = f"no connection within {self._connect_s:g} s"
            host.failed(words)
            raise DownloadError(TIMED_OUT, words, is_retried=True) from None
        except TimeoutError:
            words = f"not whole within {self.options.timeout_s:g} s"
            host.timed_out(words)
            raise DownloadError(TIMED_OUT, words, is_retried=True) from None
        except aiohttp.ClientConnectorCertificateError as error:
            raise DownloadError(NO_CERTIFICATE, str(error.certificate_error)) from None
        except aiohttp.ClientConnectorError as error:
            words = error.strerror or str(error.os_error)
            host.failed(words)
            raise DownloadError(CONNECTION_FAILED, words, is_retried=True) from None
        except aiohttp.ClientPayloadError:
            raise DownloadError(CUT_OFF, "the connection ended before the answer did", is_retried=True) from None
        except (aiohttp.ClientConnectionError, OSError) as error:
            words = str(error) or type(error).__name__
            raise DownloadError(CONNECTION_FAILED, words, is_retried=True) from None
        except aiohttp.ClientResponseError as error:  # no HTTP, or more headers than anyone needs
            raise DownloadError(BAD_ANSWER, error.message.strip().split("\n")[0]) from None
        except (aiohttp.ClientError, ValueError) as error:
            raise DownloadError(BAD_ANSWER, str(error)) from None
