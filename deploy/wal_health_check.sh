#!/bin/sh
# How a running Diptych is, in words, with what to do about it. Needs curl and jq only.
#
#   wal_health_check.sh [URL]      URL: its admin address or the one for clients; http://127.0.0.1:8900 without it
#
# Exit codes, as monitoring has them: 0 ok, 1 warning, 2 critical, 3 unknown. Limits, in the environment:
# PENDING_WARNING (1000), PENDING_CRITICAL (100000) entries; AGE_WARNING (300), AGE_CRITICAL (3600) seconds;
# PARKED_WARNING (1), PARKED_CRITICAL (never); NODES_WARNING (all), NODES_CRITICAL (1);
# VERIFY_WARNING, VERIFY_CRITICAL (never) seconds since everything was compared. `diptych health` says the same.
set -u

url=${1:-http://127.0.0.1:8900}
for tool in curl jq; do
    command -v "$tool" >/dev/null 2>&1 || { echo "UNKNOWN: $tool is not installed."; exit 3; }
done
if ! body=$(curl --silent --show-error --fail --max-time 5 "${url%/}/status" 2>&1); then
    echo "CRITICAL: no Diptych can be reached at $url: $body"
    echo "  -> Is it running? systemctl status diptych; its log says why it ended."
    exit 2
fi

report=$(printf '%s' "$body" | jq --raw-output \
    --arg pending_warning "${PENDING_WARNING:-1000}" --arg pending_critical "${PENDING_CRITICAL:-100000}" \
    --arg age_warning "${AGE_WARNING:-300}" --arg age_critical "${AGE_CRITICAL:-3600}" \
    --arg parked_warning "${PARKED_WARNING:-1}" --arg parked_critical "${PARKED_CRITICAL:-}" \
    --arg nodes_warning "${NODES_WARNING:-}" --arg nodes_critical "${NODES_CRITICAL:-1}" \
    --arg verify_warning "${VERIFY_WARNING:-}" --arg verify_critical "${VERIFY_CRITICAL:-}" '
def seconds_since: if . == null then null else (sub("\\.[0-9]+"; "") | now - fromdateiso8601 | floor | if . < 0 then 0 else . end) end;
def at_least($warning; $critical):
    if $critical != "" and . >= ($critical | tonumber) then 2
    elif $warning != "" and . >= ($warning | tonumber) then 1 else 0 end;
def finding($level; $what; $advice): if $level == 0 then empty else {level: $level, what: $what, advice: $advice} end;

(.wal // error("it has no wal")) as $log
| (.total_instances // error("it has no total_instances")) as $total
| (.healthy_instances // error("it has no healthy_instances")) as $healthy
| ($log.pending_writes // error("it has no pending_writes")) as $pending
| (($log.parked // 0) + ($log.parked_repairs // 0)) as $parked
| ($log.oldest_pending | seconds_since) as $age
| (.verified_at | seconds_since) as $verified
| [
    finding($pending | at_least($pending_warning; $pending_critical);
        "\($pending) entries are pending.";
        "A node is down or cannot keep up: diptych status; then diptych drain wait."),
    finding(($age // 0) | at_least($age_warning; $age_critical);
        "The oldest entry is \($age) s old.";
        "See which node it waits for: diptych wal list --limit 1."),
    finding($parked | at_least($parked_warning; $parked_critical);
        "\($parked) entries or repairs are parked.";
        "Decide about them: diptych wal list --parked, diptych repairs list --parked; then retry or skip."),
    finding(if $healthy < ($nodes_critical | tonumber) then 2
            elif $healthy < (if $nodes_warning == "" then $total else ($nodes_warning | tonumber) end) then 1 else 0 end;
        "\($healthy) of \($total) nodes are healthy.";
        "Start the node that is down, or see why its probes fail: diptych status, diptych events."),
    finding(if ($verify_warning + $verify_critical) == "" then 0 elif $verified == null then 1
            else ($verified | at_least($verify_warning; $verify_critical)) end;
        (if $verified == null then "Not everything was compared yet." else "Not compared for \($verified) s." end);
        "Compare now: diptych verify."),
    finding(if .leader == true then 0 else 2 end;
        "Another proxy has taken over the log.";
        "This process does not write any more: stop it, or send clients to the other one."),
    finding(if $log.available == true then 0 else 2 end;
        "The log does not answer.";
        "Bring its database back: until then nothing that a node misses can be kept."),
    finding(if $log.unprotected == true then 1 else 0 end;
        "There are writes without the log that are not compared yet.";
        "They are compared once the log is back: diptych drain wait."),
    finding(if $log.drain_paused == true then 1 else 0 end;
        "The drain is paused.";
        "Let it go on: diptych drain resume."),
    (.instances[] | select(.maintenance != null) | finding(1;
        "\(.name) is in maintenance.";
        "Take it back when the work is done: diptych node ready \(.name).")),
    (.instances[] | select(.maintenance == null and .healthy == true and .in_sync != true) | finding(1;
        "\(.name) is not in step: \(.pending_writes) pending, \(.repairs) repairs.";
        "It is being brought in step: diptych drain wait."))
  ]
| (map(.level) | max // 0),
  "\(["OK", "WARNING", "CRITICAL"][map(.level) | max // 0]): \($healthy) of \($total) nodes healthy, \($pending) entries pending, \($parked) parked.",
  (.[] | "  \(["", "warning", "critical"][.level]): \(.what)\n  -> \(.advice)")
' 2>&1) || { echo "UNKNOWN: the answer of $url cannot be understood: is it a Diptych? $report"; exit 3; }

code=$(printf '%s\n' "$report" | head -n 1)
printf '%s\n' "$report" | tail -n +2
exit "$code"
