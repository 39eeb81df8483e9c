#!/bin/sh
# Ends the Ray whose temporary folder is given, and its jobs; other Rays of this machine go on, which
# `ray stop` would end as well.
#
#   sh stop-ray.sh /tmp/manta-$USER

folder=${1:?give the temporary folder of the Ray to end}
# Every process of Ray's has the folder of its session on its command line; workers end with their
# raylet. The brackets keep the pattern from matching the shell that holds it.
pattern="[${folder%"${folder#?}"}]${folder#?}/session_"
user=$(id -u)
pkill -TERM -u "$user" -f "$pattern"
tenths=0
while pgrep -u "$user" -f "$pattern" > /dev/null; do
  tenths=$((tenths + 1))
  [ "$tenths" -lt 50 ] || pkill -KILL -u "$user" -f "$pattern"
  [ "$tenths" -lt 100 ] || { echo "the Ray in $folder does not end" >&2; exit 1; }
  sleep 0.1
done
