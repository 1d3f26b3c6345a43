"""CPU package and DRAM joules from the kernel's powercap tree (Intel RAPL; AMD uses the same driver and names)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loras_bench.metering.clock import Clock
from loras_bench.metering.sources import PowerKind, Reading, SourceError, SourceKind

POWERCAP = Path("/sys/class/powercap")


@dataclass
class _Domain:
    """One counter of the tree: microjoules, wrapping at `range_uj`; `total_uj` does not wrap."""

    path: Path
    range_uj: int
    last_uj: int
    total_uj: int = 0

    def advance(self) -> int:
        now_uj = int((self.path / "energy_uj").read_text())
        # The counter wraps after minutes to an hour of load; the poller reads far more often than that.
        self.total_uj += now_uj - self.last_uj if now_uj >= self.last_uj else now_uj + self.range_uj - self.last_uj
        self.last_uj = now_uj
        return self.total_uj


class RaplSource:
    """Joules of all CPU packages and of the DRAM domains beside them.

    `core` and `uncore` subdomains are inside their package, `psys` contains the packages and the `intel-rapl-mmio` tree
    repeats them: adding any of these would count joules twice.

    Raises:
        SourceError: There is no powercap tree (virtual machines hide it) or its counters are for root alone
            (since CVE-2020-8694).
    """

    kind: SourceKind = "cpu"
    name = "rapl"
    power_kind: PowerKind | None = None

    def __init__(self, clock: Clock, root: Path = POWERCAP) -> None:
        self._clock = clock
        self.flags: dict[str, str] = {}
        try:
            self._domains = [self._open(zone) for zone in self._zones(root)]
        except PermissionError as error:
            raise SourceError(f"{error.filename} is readable by root only (CVE-2020-8694)") from error
        except (OSError, ValueError) as error:
            raise SourceError(f"RAPL cannot be read: {error}") from error
        if not self._domains:
            raise SourceError(f"no RAPL package under {root} (usual in virtual machines and containers)")

    @staticmethod
    def _zones(root: Path) -> list[Path]:
        zones = []
        for zone in sorted(root.glob("intel-rapl:*")):
            top_level = zone.name.count(":") == 1
            wanted = "package-" if top_level else "dram"
            if (zone / "name").read_text().startswith(wanted):
                zones.append(zone)
        return zones

    @staticmethod
    def _open(zone: Path) -> _Domain:
        range_uj = int((zone / "max_energy_range_uj").read_text())
        return _Domain(zone, range_uj, last_uj=int((zone / "energy_uj").read_text()))

    def read(self, with_power: bool = True) -> Reading:
        """Joules since the source was opened, all domains together."""
        try:
            total_uj = sum(domain.advance() for domain in self._domains)
        except (OSError, ValueError) as error:
            raise SourceError(f"RAPL read failed: {error}") from error
        return Reading(self._clock.now(), total_uj / 1e6, None)

    def state(self) -> None:
        return None
