# How the other scripts here say what they do, and that they cannot: sourced by them, from the root of the checkout. `step`
# writes to the file that they call `log`.

cannot() {
	echo "holdfast: cannot go on: $*" >&2
	exit 1
}

# step SENTENCE COMMAND...: run it with its output in the log, and show that time passes.
step() {
	local sentence=$1 started=$SECONDS said=$SECONDS pid
	shift
	printf '==> %s' "$sentence"
	"$@" >>"$log" 2>&1 </dev/null &
	pid=$!
	# A background job does not see Ctrl-C. pip is told to stop; apt finishes the package in hand, and its clean-up runs.
	trap 'kill "$pid" 2>/dev/null; wait "$pid"; exit 130' INT TERM
	while kill -0 "$pid" 2>/dev/null; do
		sleep 0.2
		if ((SECONDS - said >= 2)); then
			printf ' .'
			said=$SECONDS
		fi
	done
	if ! wait "$pid"; then
		printf ' failed\n'
		tail -n 20 "$log" >&2
		cannot "\"$sentence\" failed; the lines above are the end of $log"
	fi
	trap - INT TERM
	printf ' (%d s)\n' $((SECONDS - started))
}
