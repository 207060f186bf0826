"""Errors that prevent the start of a server."""

from __future__ import annotations

__all__ = [
    "AcceleratorUnavailable",
    "AddressInUse",
    "CertificatesUnusable",
    "Exposed",
    "KeysUnusable",
    "ModelUnavailable",
    "StartupError",
    "StateUnusable",
    "TracingUnavailable",
]


class StartupError(Exception):
    """The server cannot start. The message explains to the operator why, and how to fix it."""


class AcceleratorUnavailable(StartupError):
    """A device, a package or a compiler that the chosen accelerator needs is missing."""


class ModelUnavailable(StartupError):
    """The model is missing, unreachable, incomplete, or of a kind that Calotype does not support."""


class TracingUnavailable(StartupError):
    """OpenTelemetry, or the exporter that the operator chose, is not installed."""


class StateUnusable(StartupError):
    """The state folder cannot be used: missing permission, used by another server, newer version, or damaged."""


class KeysUnusable(StartupError):
    """The file of API keys cannot be read, or contains an invalid record."""


class CertificatesUnusable(StartupError):
    """A certificate, its key or a CA cannot be read, or the key does not belong to the certificate."""


class Exposed(StartupError):
    """The server would listen on a public address without TLS or without API keys."""


class AddressInUse(StartupError):
    """The address to listen on is already in use."""
