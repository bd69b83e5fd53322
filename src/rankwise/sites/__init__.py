"""Sites: the weights of a model that can be adapted, and the only code that reads or writes one."""

from rankwise.sites.coupling import Axis
from rankwise.sites.discover import block_site, find_sites
from rankwise.sites.site import Site
from rankwise.sites.spec import SiteSpec
from rankwise.sites.targets import resolve

__all__ = ["Axis", "Site", "SiteSpec", "block_site", "find_sites", "resolve"]
