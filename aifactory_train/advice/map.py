"""The 32 as points of an inline SVG: no coast, no script, nothing from outside."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from aifactory_train.sites.catalogue import ROOM
from aifactory_train.sites.index import load_index
from aifactory_train.sites.reading import read_yaml

WIDTH, HEIGHT = 860, 660
_WEST, _EAST, _SOUTH, _NORTH = -25.0, 37.0, 33.5, 66.5
#: A degree of longitude is as wide at this latitude as on the map.
_TRUE_AT = 52.0


@dataclass(frozen=True)
class Point:
    """A member on the map; ``state``: ``fits`` (a system of its own does), ``linked`` (one of a linked factory does),
    ``none``."""

    id: str
    name: str
    kind: str
    country: str
    town: str
    x: float
    y: float
    state: str
    best: str  # its best site, with rank
    left: bool  # the name stands to the left


def place(latitude: float, longitude: float) -> tuple[float, float]:
    """Pixels of a point: both axes at one scale at the latitude of middle Europe."""
    scale = min(WIDTH / (_EAST - _WEST) / math.cos(math.radians(_TRUE_AT)), HEIGHT / (_NORTH - _SOUTH))
    across = scale * math.cos(math.radians(_TRUE_AT))
    left = (WIDTH - across * (_EAST - _WEST)) / 2
    return round(left + across * (longitude - _WEST), 1), round(scale * (_NORTH - latitude), 1)


def points(rows: list[dict[str, Any]]) -> list[Point]:
    """The members with what the ranking says of them."""
    places = read_yaml(ROOM / "places.yaml")
    fits = {row["id"]: row["rank"] for row in rows if row["fits"]}
    found = []
    for member in load_index()["members"]:
        own = [s for s in member["systems"] if s in fits]
        linked = [s for s in member["linked_systems"] if s in fits]
        best = min(own or linked, key=lambda s: fits[s], default=None)
        state = "fits" if own else "linked" if linked else "none"
        where = places[member["id"]]
        x, y = place(*where["at"])
        words = f"{best}, rank {fits[best]}" if best else "no site for this job"
        found.append(
            Point(
                id=member["id"],
                name=member["name"],
                kind=member["kind"],
                country=member["country"],
                town=where["town"],
                x=x,
                y=y,
                state=state,
                best=words,
                left=where.get("label") == "left",
            )
        )
    return found


def links(found: list[Point]) -> list[tuple[float, float, float, float]]:
    """Lines from antennas to their factories."""
    at = {p.id: p for p in found}
    return [
        (at[m["id"]].x, at[m["id"]].y, at[other].x, at[other].y)
        for m in load_index()["members"]
        for other in m["links"]
        if other in at
    ]


def graticule() -> list[tuple[float, float, float, float, str]]:
    """Lines every ten degrees, with their names."""
    lines = []
    for latitude in range(40, 70, 10):
        (x1, y1), (x2, y2) = place(latitude, _WEST), place(latitude, _EAST)
        lines.append((x1, y1, x2, y2, f"{latitude}° N"))
    for longitude in range(-20, 40, 10):
        (x1, y1), (x2, y2) = place(_SOUTH, longitude), place(_NORTH, longitude)
        lines.append((x1, y1, x2, y2, f"{abs(longitude)}° {'W' if longitude < 0 else 'E'}" if longitude else "0°"))
    return lines
