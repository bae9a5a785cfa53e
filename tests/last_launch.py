"""What the emulator's `kh_simt_last_launch` fills."""

from __future__ import annotations

import ctypes


class LastLaunch(ctypes.Structure):
    """What the emulator tells of the latest launch in a library."""

    _fields_ = (
        ("count", ctypes.c_ulonglong),
        ("device", ctypes.c_int),
        ("stream", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
    )
