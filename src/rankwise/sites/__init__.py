"""Places in a model that can be adapted, and the only code that touches a base weight."""

from rankwise.sites.discover import block_site, find_sites
from rankwise.sites.site import Site
from rankwise.sites.spec import SiteSpec
from rankwise.sites.targets import resolve

__all__ = ["Site", "SiteSpec", "block_site", "find_sites", "resolve"]
