#!/bin/sh
# A Kaggle machine's view of files and network. Run in new network and mount namespaces:
#   unshare --map-root-user --net --mount sh sandbox.sh ROOT INPUT WORKING HIDDEN COMMAND...
# ROOT is an empty folder; the command sees INPUT as /kaggle/input, read-only, WORKING as /kaggle/working, nothing in
# the folder HIDDEN, and no network but loopback.
set -eu
root=$1 input=$2 working=$3 hidden=$4
shift 4

ip link set lo up
mount -t tmpfs tmpfs "$root"
for entry in /*; do
  name=${entry#/}
  if [ -L "$entry" ]; then
    cp -P "$entry" "$root/$name"
  elif [ -d "$entry" ] && [ "$name" != kaggle ]; then
    mkdir "$root/$name"
    mount --rbind "$entry" "$root/$name"
  fi
done
mkdir -p "$root/kaggle/input" "$root/kaggle/working"
mount --bind "$input" "$root/kaggle/input"
mount -o remount,bind,ro,nosuid,nodev "$root/kaggle/input"
mount --bind "$working" "$root/kaggle/working"
mount -t tmpfs -o ro tmpfs "$root$hidden"
exec chroot "$root" sh -c 'cd /kaggle/working && exec "$@"' sh "$@"
