#!/bin/sh
# Installs the S3 server that the tests start, where that is possible. Never fails: without it
# those tests are skipped and say why.
if command -v radosgw >/dev/null && command -v ceph-osd >/dev/null && command -v ceph-mon >/dev/null
then
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "No S3 server for the tests: installing radosgw needs root and apt-get." \
        "Tests that need it are skipped." >&2
    exit 0
fi
log=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
if apt-get update -qq >"$log" 2>&1 && apt-get install -y -qq --no-install-recommends \
    ceph-mon ceph-osd ceph-common radosgw >>"$log" 2>&1
then
    rm -f "$log"
else
    echo "No S3 server for the tests: radosgw could not be installed, see $log." \
        "Tests that need it are skipped." >&2
fi
exit 0
