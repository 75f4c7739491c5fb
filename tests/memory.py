"""What a call takes of memory, by the kernel's own count (Linux)."""


def _resident_bytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024


def resident_memory():
    return _resident_bytes("VmRSS")


def peak_memory(run):
    """The result, and the bytes resident at the worst moment beyond those before."""
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # resets the high-water mark
    before = _resident_bytes("VmRSS")
    result = run()
    return result, _resident_bytes("VmHWM") - before
