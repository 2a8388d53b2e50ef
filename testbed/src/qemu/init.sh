#!/bin/busybox sh
# The guest's first process: mounts, drivers, and the shell for the test.
/bin/busybox mkdir -p /proc /sys /dev /tmp /run /etc /root
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox --install -s /bin 2>/dev/null
export PATH=/bin HOME=/root

while read -r module; do
    insmod "$module" || echo "cannot load $module"
done </modules/order
ip link set lo up

# The shell gets a session of its own, so that nothing on the console can
# take its line away.
setsid /shell
echo "the shell ended"
poweroff -f
