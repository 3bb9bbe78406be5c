"""Who runs the trials: a coordinator that asks and tells, and a worker that trains."""

from hpo.machine import require_supported_system

require_supported_system()
