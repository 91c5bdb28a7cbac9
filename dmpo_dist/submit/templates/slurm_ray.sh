# Ray: a head on the first node and a worker on every other. The token keeps strangers out; it is in no file.
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN="$(python -c 'import secrets; print(secrets.token_hex(32))')"
address="$head_address:$port"
export RAY_AUTH_TOKEN RAY_ADDRESS="$address"

# Jobs that share a node do not meet: worker ports of 0 are free ones, and Ray's client server, which ends the head where
# its usual port is taken, gets one of the job's own.
node=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus={{ submit.gpus_per_node }} --min-worker-port=0 --max-worker-port=0 --block)
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head_node" \
    ray start --head --node-ip-address="$head_address" --port="$port" --ray-client-server-port=$((port - 10000)) \
    --include-dashboard=false "${node[@]}" &
head=$!
until ray health-check --address "$address" >/dev/null 2>&1; do
    kill -0 "$head" 2>/dev/null || { echo "error: the Ray head did not start; see above" >&2; exit 1; }
    ((SECONDS < {{ submit.ready_seconds }})) || { echo "error: no Ray head after $SECONDS s (submit.ready_seconds)" >&2; exit 1; }
    sleep 1
done
if ((SLURM_NNODES > 1)); then
    others=$((SLURM_NNODES - 1))
    srun --overlap --nodes="$others" --ntasks="$others" --exclude="$head_node" \
        ray start --address="$address" "${node[@]}" &
fi

# Waits for the nodes, and says what is missing.
python -m dmpo_dist.submit.ready --config "$config" --nodes "$SLURM_NNODES" --seconds {{ submit.ready_seconds }} \
    --versions dmpo_dist={{ dmpo_version }} &
wait $!
python -m dmpo_dist {{ job.verb }} --config "$config" "${resume[@]}" &
