//! Members of an engine in network namespaces of their own, all on one bridge, so that they can be parted while the nodes in
//! front of them reach each one. Needs root, `ip` (iproute2), and a process that is in a new network namespace itself:
//! `scripts/engine-partition.sh` makes that.

use std::process::Command;

/// No interface has it: what is sent to it is lost.
const NOWHERE: &str = "02:00:00:00:ff:ff";
const BRIDGE: &str = "nkvbr";

/// The namespaces.
#[derive(Debug)]
pub struct Net {
    members: usize,
}

impl Net {
    /// Makes them. Members are numbered from 0 on.
    ///
    /// # Panics
    ///
    /// Where that is not possible, and where this process is in the network of the machine: nothing there is to be changed.
    #[must_use]
    pub fn make(members: usize) -> Self {
        let links = ip("-o link");
        assert_eq!(
            links.lines().count(),
            1,
            "not in a network namespace of its own (scripts/engine-partition.sh): {links}"
        );
        let net = Net { members };
        for line in ["link set lo up", &format!("link add {BRIDGE} type bridge"), &format!("link set {BRIDGE} up")] {
            ip(line);
        }
        ip(&format!("addr add {}/24 dev {BRIDGE}", address(members)));
        for member in 0..members {
            let (space, own) = (net.namespace(member), net.address(member));
            ip(&format!("netns add {space}"));
            ip(&format!("link add v{member} type veth peer name eth0 netns {space}"));
            ip(&format!("link set v{member} master {BRIDGE} up"));
            for line in ["link set lo up", &format!("addr add {own}/24 dev eth0"), "link set eth0 up"] {
                ip(&format!("-n {space} {line}"));
            }
        }
        net
    }

    /// The address of a member.
    #[must_use]
    pub fn address(&self, member: usize) -> String {
        address(member)
    }

    /// The name of its namespace.
    #[must_use]
    pub fn namespace(&self, member: usize) -> String {
        format!("nkv{member}")
    }

    /// From now on what this member and the others send to each other is lost.
    pub fn part(&self, member: usize) {
        for other in (0..self.members).filter(|other| *other != member) {
            self.lose(member, other);
            self.lose(other, member);
        }
    }

    fn lose(&self, from: usize, to: usize) {
        let (space, to) = (self.namespace(from), address(to));
        ip(&format!("-n {space} neigh replace {to} lladdr {NOWHERE} dev eth0 nud permanent"));
    }

    /// All members reach each other.
    pub fn heal(&self) {
        (0..self.members)
            .for_each(|member| drop(ip(&format!("-n {} neigh flush nud permanent dev eth0", self.namespace(member)))));
    }
}

/// Of a member, or of the bridge behind the last one.
fn address(number: usize) -> String {
    format!("198.18.77.{}", number + 1)
}

fn ip(line: &str) -> String {
    let output = Command::new("ip").args(line.split(' ')).output().unwrap_or_else(|error| panic!("ip: {error}"));
    assert!(output.status.success(), "ip {line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
