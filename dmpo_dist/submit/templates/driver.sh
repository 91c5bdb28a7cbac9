#!/usr/bin/env bash
# Rendered by `dmpo submit {{ job.verb }} --to {{ target }}`, dmpo_dist {{ dmpo_version }}: what the driver runs on the Ray cluster.
set -euo pipefail
config="$(dirname -- "${BASH_SOURCE[0]}")/config.yaml"

# Waits for the nodes, then checks that they run our version and see the data.
python -m dmpo_dist.submit.ready --config "$config" --seconds {{ submit.ready_seconds }}{% if nodes %} --nodes {{ nodes }}{% endif %} \
    --versions dmpo_dist={{ dmpo_version }} ray={{ ray_version }}{% for path in job.paths %} \
    --path {{ path | sh }}{% endfor %}


{% if job.verb == "doctor" %}
resume=()
{% elif job.resume %}
resume=(--resume)
{% elif retries %}
# A job that KubeRay starts again goes on from the latest checkpoint (--resume refuses another configuration's run). One
# that failed before it had any, as failed.txt says, starts anew.
resume=()
if [[ -f {{ (output ~ "/config.yaml") | sh }} && ! -f {{ (output ~ "/failed.txt") | sh }} ]]; then
    resume=(--resume)
fi
{% else %}
resume=()
{% endif %}
exec python -m dmpo_dist {{ job.verb }} --config "$config" "${resume[@]}"
