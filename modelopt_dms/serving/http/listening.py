# SPDX-License-Identifier: Apache-2.0
"""The socket of a server, taken before anything heavy is imported: a busy port is one error at once."""

import errno
import ipaddress
import socket


class ServeError(ValueError):
    """A server that cannot start; the message names what was given and what to do."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Clients that come while the model is loaded wait.

    Args:
        host: an address of this machine; a name is resolved.
        port: 0 takes a free one.

    Raises:
        ServeError: the port is taken or not allowed, or the address is not this machine's.
    """
    if not 0 <= port <= 65535:
        raise ServeError(f"--port {port} must be 0 (any free one) to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ServeError(f"--host {host!r} cannot be resolved: {error}") from error
    found = socket.socket(family, kind)
    try:
        # Connections of a server that has just stopped do not hold the port.
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)
    except OSError as error:
        found.close()
        raise ServeError(f"--port {port}: {_why(error, host, port)}") from error
    return found


def _why(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{host}:{port} is taken by another program; choose another one, or 0 for any that is free"
    if error.errno == errno.EACCES:
        return f"{host}:{port} needs more rights; choose one of 1024 or above"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host} is no address of this machine"
    return f"{host}:{port} cannot be used: {error.strerror}"


def is_loopback(listening: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback
