#!/usr/bin/env bash
# Installs what ftckpt needs on a Debian machine, and only what is missing.
#
#   deps.sh [runtime] [test] [criu]        (no argument: all three)
#
#   runtime  iptables, ip, nsenter, ps/sysctl
#   test     redis-server and its tools, nginx, tcpdump, a C compiler for the race
#            detector; no service is left running
#   criu     a CRIU that really dumps and restores an established TCP
#            connection on this kernel: the distribution's where it does, else
#            a newer suite's in a private directory
#
# The system's libc is never touched: the private CRIU brings its own and is
# run through its own loader. Safe to run again, and by two at a time.
#
# FTCKPT_CRIU_PREFIX  where the private CRIU goes (/var/lib/ftckpt/criu)
# FTCKPT_CRIU         use this criu and install none
set -euo pipefail

readonly PREFIX=${FTCKPT_CRIU_PREFIX:-/var/lib/ftckpt/criu}
readonly WRAPPER=$PREFIX/bin/criu
readonly NEWER_SUITES="testing sid"
readonly CRIU_MIN="4.2"

say() { printf 'deps: %s\n' "$*" >&2; }
die() {
	say "error: $*"
	exit 1
}

# as_root re-runs this script through sudo when it is not root already.
as_root() {
	[ "$(id -u)" -eq 0 ] && return 0
	command -v sudo >/dev/null || die "must be root to $1, and there is no sudo: run it as root"
	if [ ! -t 0 ]; then
		sudo -n true 2>/dev/null || die "must be root to $1: run it as root, or with sudo"
	fi
	exec sudo --preserve-env=FTCKPT_CRIU,FTCKPT_CRIU_PREFIX,http_proxy,https_proxy,no_proxy \
		-- "$BASH" "$0" "${ARGS[@]}"
}

# ---------------------------------------------------------------- packages

need() { # COMMAND PACKAGE: note PACKAGE as missing when COMMAND is
	command -v "$1" >/dev/null || [ -x "/usr/sbin/$1" ] || [ -x "/sbin/$1" ] || MISSING+=("$2")
}

apt_fetch() { # apt-get with the options every call here wants
	DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@"
}

# deny_services keeps package scripts from starting daemons (Debian policy
# 9.3.3.1) until the script ends. An administrator's own policy stays.
deny_services() {
	[ -e /usr/sbin/policy-rc.d ] && return 0
	printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
	chmod 755 /usr/sbin/policy-rc.d
	DENIED=1
}

install_missing() {
	[ ${#MISSING[@]} -eq 0 ] && return 0
	as_root "install ${MISSING[*]}"
	command -v apt-get >/dev/null || die "missing ${MISSING[*]}, and there is no apt-get: install them by hand"
	say "installing ${MISSING[*]}"
	deny_services
	apt_fetch install --no-install-recommends "${MISSING[@]}" >"$TMP/apt.log" 2>&1 ||
		{
			apt_fetch update >>"$TMP/apt.log" 2>&1 &&
				apt_fetch install --no-install-recommends "${MISSING[@]}" >>"$TMP/apt.log" 2>&1
		} || die "cannot install ${MISSING[*]} ($(apt_reason "$TMP/apt.log")): give this machine a way to its package mirror, or install them by hand"
	local p
	for p in "${MISSING[@]}"; do
		# Where systemd is, an enabled unit would start at the next boot.
		command -v systemctl >/dev/null || break
		case $p in
		redis-server) systemctl disable redis-server.service >/dev/null 2>&1 ;;
		nginx) systemctl disable nginx.service >/dev/null 2>&1 ;;
		esac
	done
	return 0
}

apt_reason() { # the last complaint in an apt log, on one line
	local line
	line=$(grep -E '^(E|W|Err):?' "$1" | tail -n 1 || true)
	printf '%s' "${line:-apt-get failed}"
}

# ------------------------------------------------------------------- probe

# probe CRIU: dumps a process that holds an established TCP connection, with the
# options ftckpt uses, restores it and has it send bytes over that connection.
# `criu check` is not enough: 4.1 calls kernel 6.18 good and then cannot dump a
# socket. All of it happens in private namespaces and in $TMP.
probe() {
	local dir=$TMP/probe
	rm -rf "$dir"
	mkdir -p "$dir/img"
	cat >"$dir/target.pl" <<'PERL'
use strict; use IO::Socket::INET; use IO::Select; use POSIX ();
my ($dir) = @ARGV;
POSIX::close($_) for 3 .. 255; # inherited: CRIU refuses files of another mount namespace
my $l = IO::Socket::INET->new(Listen => 1, LocalAddr => "127.0.0.1:7") or die "listen: $!";
my $c = IO::Socket::INET->new(PeerAddr => "127.0.0.1:7") or die "connect: $!";
my $s = $l->accept or die "accept: $!";
sub touch { open my $f, ">", "$dir/$_[0]" or die; close $f }
touch("ready");
select undef, undef, undef, 0.01 until -e "$dir/restored";
syswrite $c, "bytes" or die "write: $!";
sysread($s, my $got, 5) if IO::Select->new($s)->can_read(5);
touch("carried") if defined $got && $got eq "bytes";
PERL
	cat >"$dir/run.sh" <<'RUN'
set -u
dir=$1; shift
wait_for() { n=0; while [ ! -e "$dir/$1" ]; do n=$((n+1)); [ $n -gt 500 ] && exit 3; sleep 0.01; done; }
ip link set lo up || exit 4
echo 300 >/proc/sys/kernel/ns_last_pid # so that CRIU's own pids are not the image's
setsid perl "$dir/target.pl" "$dir" </dev/null >/dev/null 2>&1 &
pid=$!
wait_for ready
echo 100 >/proc/sys/kernel/ns_last_pid
"$@" dump -t $pid -D "$dir/img" -o dump.log -v1 --tcp-established --skip-in-flight --network-lock skip || exit 5
wait $pid 2>/dev/null
"$@" restore -d -D "$dir/img" -o restore.log -v1 --tcp-established --network-lock skip || exit 6
: >"$dir/restored"
wait_for carried
RUN
	timeout 60 unshare --net --mount --pid --fork --kill-child --mount-proc \
		sh "$dir/run.sh" "$dir" "$@" >"$dir/out" 2>&1
}

probe_reason() { # why the last probe failed, on one line
	local line
	line=$(cat "$TMP"/probe/img/*.log "$TMP/probe/out" 2>/dev/null | grep -v RLIMIT_NOFILE | grep -E 'Error|rror:|not ' | head -n 1 || true)
	printf '%s' "${line:-no message}"
}

# -------------------------------------------------------------------- criu

# newer_source SUITE: this machine's own package source, its suite replaced.
newer_source() {
	local list parts codename f
	eval "$(apt-config shell list Dir::Etc::sourcelist/f parts Dir::Etc::sourceparts/d)"
	# shellcheck source=/dev/null # each machine has its own
	codename=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
	for f in "$parts"*.sources; do # deb822-style
		[ -r "$f" ] || continue
		sed '/^#/d' "$f" | awk -v suite="$1" -v codename="$codename" '
			BEGIN { RS = ""; FS = "\n" }
			{
				split("", field); key = ""
				for (i = 1; i <= NF; i++) {
					if ($i ~ /^[ \t]/) { field[key] = field[key] "\n" $i; continue }
					p = index($i, ":"); key = tolower(substr($i, 1, p - 1)); field[key] = substr($i, p + 1)
				}
				if (tolower(field["enabled"]) ~ /no|false/) next
				if (field["uris"] ~ /cdrom:/) next
				if (!has(field["types"], "deb") || !has(field["components"], "main")) next
				if (!has(field["suites"], codename) && !has(field["suites"], "stable") &&
				    !has(field["suites"], "testing") && !has(field["suites"], "unstable") && !has(field["suites"], "sid")) next
				field["types"] = " deb"; field["suites"] = " " suite; field["components"] = " main"
				for (key in field) if (key != "") print key ":" field[key]
				exit
			}
			function has(list, word,   n, a, j) {
				n = split(list, a, /[ \t\n]+/)
				for (j = 1; j <= n; j++) if (a[j] == word) return 1
				return 0
			}' >"$TMP/apt/parts/newer.sources"
		[ -s "$TMP/apt/parts/newer.sources" ] && return 0
		rm -f "$TMP/apt/parts/newer.sources"
	done
	for f in "$list" "$parts"*.list; do # one-line-style
		[ -r "$f" ] || continue
		awk -v suite="$1" -v codename="$codename" '
			$1 != "deb" || /cdrom:/ { next }
			{
				line = $0; opts = ""
				sub(/[ \t]#.*/, "", line); sub(/^[ \t]*deb[ \t]+/, "", line)
				if (match(line, /^\[[^]]*\]/)) { opts = substr(line, 1, RLENGTH) " "; line = substr(line, RLENGTH + 1) }
				n = split(line, w, /[ \t]+/); i = (w[1] == "") ? 2 : 1
				if (w[i+1] !~ ("^(" codename "|stable|testing|unstable|sid)$")) next
				for (j = i + 2; j <= n; j++) if (w[j] == "main") { print "deb " opts w[i] " " suite " main"; exit }
			}' "$f" >"$TMP/apt/parts/newer.list"
		[ -s "$TMP/apt/parts/newer.list" ] && return 0
		rm -f "$TMP/apt/parts/newer.list"
	done
	return 1
}

# private_apt: apt-get that sees only our source and keeps its state in $TMP. Its
# dpkg status is empty, so that it downloads the whole closure, libc included,
# instead of upgrading the system's.
private_apt() {
	apt_fetch -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$TMP/apt/parts" \
		-o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null \
		-o Dir::State="$TMP/apt/state" -o Dir::State::status="$TMP/apt/status" \
		-o Dir::Cache="$TMP/apt/cache" -o Dir::Log="$TMP/apt" -o APT::Sandbox::User=root \
		-o APT::Update::Post-Invoke-Success::=/bin/true -o Acquire::Languages=none \
		-o Debug::NoLocking=true "$@"
}

# fetch_newer SUITE STAGING: unpacks SUITE's criu and its closure into STAGING.
fetch_newer() {
	rm -rf "$TMP/apt" "$2"
	mkdir -p "$TMP/apt/parts" "$TMP/apt/state/lists/partial" "$TMP/apt/cache/archives/partial" "$2"
	: >"$TMP/apt/status"
	newer_source "$1" || {
		WHY="no Debian package source that is enabled on this machine"
		return 1
	}
	if ! { private_apt -o APT::Update::Error-Mode=any update &&
		private_apt install --download-only --no-install-recommends criu; } >"$TMP/criu-apt.log" 2>&1; then
		WHY=$(apt_reason "$TMP/criu-apt.log")
		return 1
	fi
	local deb
	for deb in "$TMP"/apt/cache/archives/*.deb; do
		[ -e "$deb" ] || {
			WHY="$1 has no criu for this machine"
			return 1
		}
		dpkg -x "$deb" "$2"
	done
}

# write_wrapper STAGING: bin/criu, which runs the private criu under the loader
# and the libraries that came with it. The names in it are those of PREFIX,
# where STAGING is going to be.
write_wrapper() {
	local loader lib bin
	loader=$(find "$1/usr" "$1/lib" -name 'ld-linux*.so.*' -type f 2>/dev/null | head -n 1)
	lib=$(find "$1/usr" "$1/lib" -name libc.so.6 2>/dev/null | head -n 1)
	bin=$(find "$1/usr/sbin" "$1/usr/bin" "$1/sbin" -name criu -type f 2>/dev/null | head -n 1)
	[ -n "$loader" ] && [ -n "$lib" ] && [ -n "$bin" ] || return 1
	mkdir -p "$1/bin"
	cat >"$1/bin/criu" <<WRAP
#!/bin/sh
exec "$PREFIX${loader#"$1"}" --library-path "$PREFIX$(dirname "${lib#"$1"}")" "$PREFIX${bin#"$1"}" "\$@"
WRAP
	chmod 755 "$1/bin/criu"
}

install_private_criu() {
	{ command -v apt-get && command -v dpkg; } >/dev/null ||
		die "this kernel needs criu >= $CRIU_MIN and this is no Debian: install one and set FTCKPT_CRIU to its path"
	local suite staging=$PREFIX.new.$$ WHY=""
	CLEAN+=("$staging")
	mkdir -p "$(dirname "$PREFIX")"
	for suite in $NEWER_SUITES; do
		say "fetching criu of $suite into $PREFIX"
		fetch_newer "$suite" "$staging" || continue
		write_wrapper "$staging" || {
			WHY="its packages have no loader, libc or criu where expected"
			continue
		}
		rm -rf "${staging:?}/usr/share"
		rm -rf "$PREFIX"
		mv "$staging" "$PREFIX" # the wrapper's names are right only from here on
		if probe "$WRAPPER"; then
			return 0
		fi
		WHY="criu of $suite cannot dump and restore here: $(probe_reason)"
		rm -rf "$PREFIX"
	done
	die "cannot get a criu >= $CRIU_MIN ($WHY): give this machine a way to its package mirror, or install one and set FTCKPT_CRIU to its path"
}

ensure_criu() {
	as_root "probe criu"
	local system
	if [ -n "${FTCKPT_CRIU:-}" ]; then
		probe "$FTCKPT_CRIU" || die "FTCKPT_CRIU=$FTCKPT_CRIU cannot dump and restore here: $(probe_reason)"
		say "criu: $FTCKPT_CRIU"
		return 0
	fi
	if [ -x "$WRAPPER" ] && probe "$WRAPPER"; then
		say "criu: $WRAPPER"
		return 0
	fi
	system=$(command -v criu || true)
	if [ -n "$system" ] && "$system" --version 2>/dev/null | awk -v min="$CRIU_MIN" '
		/^Version:/ { split($2, v, "."); split(min, m, "."); ok = v[1] > m[1] || (v[1] == m[1] && v[2] >= m[2]) }
		END { exit !ok }' && probe "$system"; then
		say "criu: $system"
		return 0
	fi
	install_private_criu
	say "criu: $WRAPPER"
}

# -------------------------------------------------------------------- main

ARGS=("$@")
MISSING=()
CLEAN=()
DENIED=
PATH=$PATH:/usr/sbin:/sbin

cleanup() {
	[ -z "$DENIED" ] || rm -f /usr/sbin/policy-rc.d
	rm -rf "$TMP" ${CLEAN[@]+"${CLEAN[@]}"}
}
TMP=$(mktemp -d "${TMPDIR:-/tmp}/ftckpt-deps.XXXXXX")
trap cleanup EXIT
trap 'exit 130' INT TERM HUP

[ $# -gt 0 ] || set -- runtime test criu
want_criu=
for part in "$@"; do
	case $part in
	runtime)
		need iptables iptables
		need ip iproute2
		need nsenter util-linux
		need sysctl procps
		;;
	test)
		need redis-server redis-server
		need redis-cli redis-tools
		need nginx nginx
		need tcpdump tcpdump
		need gcc gcc # with libc6-dev, for the race detector
		[ -e /usr/include/stdlib.h ] || MISSING+=(libc6-dev)
		;;
	criu)
		# What the probe itself needs.
		need ip iproute2
		need unshare util-linux
		want_criu=1
		;;
	*)
		say "error: unknown part \"$part\": want runtime, test or criu"
		exit 2
		;;
	esac
done

if [ "$(id -u)" -eq 0 ]; then # one at a time
	exec 9>/run/ftckpt-deps.lock
	flock 9
fi
install_missing
[ -z "$want_criu" ] || ensure_criu
