//! Which addresses are those of public servers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// IPv4 networks that are no public servers, by address and length of the prefix: those of IANA's
/// registry of special addresses, multicast, and an address at which a cloud answers its machines.
const PRIVATE_V4: &[(Ipv4Addr, u32)] = &[
    (Ipv4Addr::UNSPECIFIED, 8),
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    // Also the metadata of most clouds.
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    (Ipv4Addr::new(192, 0, 2, 0), 24),
    (Ipv4Addr::new(192, 88, 99, 0), 24),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    (Ipv4Addr::new(198, 51, 100, 0), 24),
    (Ipv4Addr::new(203, 0, 113, 0), 24),
    (Ipv4Addr::new(224, 0, 0, 0), 4),
    (Ipv4Addr::new(240, 0, 0, 0), 4),
    // Azure's metadata.
    (Ipv4Addr::new(168, 63, 129, 16), 32),
];

/// IPv6 networks within `2000::/3`, the range of public addresses, that are no public servers.
const PRIVATE_V6: &[(Ipv6Addr, u32)] = &[
    // Protocols, among them Teredo.
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23),
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32),
    // 6to4.
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16),
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20),
];

const PUBLIC_V6: (Ipv6Addr, u32) = (Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);
/// Addresses of IPv4 servers behind a translator.
const TRANSLATED: (Ipv6Addr, u32) = (Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0), 96);

/// Whether an address can be that of a public server.
pub(super) fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !PRIVATE_V4.iter().any(|&network| is_in_v4(address, network)),
        IpAddr::V6(address) => {
            let translated = is_in_v6(address, TRANSLATED).then(|| last_four(address));
            if let Some(inner) = address.to_ipv4_mapped().or(translated) {
                return is_public(inner.into());
            }
            is_in_v6(address, PUBLIC_V6)
                && !PRIVATE_V6.iter().any(|&network| is_in_v6(address, network))
        }
    }
}

fn last_four(address: Ipv6Addr) -> Ipv4Addr {
    Ipv4Addr::from(address.to_bits() as u32)
}

fn is_in_v4(address: Ipv4Addr, (network, bits): (Ipv4Addr, u32)) -> bool {
    (address.to_bits() ^ network.to_bits()) >> (32 - bits) == 0
}

fn is_in_v6(address: Ipv6Addr, (network, bits): (Ipv6Addr, u32)) -> bool {
    (address.to_bits() ^ network.to_bits()) >> (128 - bits) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_private_networks_are_known() {
        for (text, expected) in [
            ("0.255.255.255", false),
            ("1.0.0.0", true),
            ("9.255.255.255", true),
            ("10.255.255.255", false),
            ("100.63.255.255", true),
            ("100.64.0.0", false),
            ("100.127.255.255", false),
            ("100.128.0.0", true),
            ("127.255.255.254", false),
            ("172.15.255.255", true),
            ("172.32.0.0", true),
            ("168.63.129.16", false),
            ("168.63.129.17", true),
            ("198.19.255.255", false),
            ("223.255.255.255", true),
            ("239.1.2.3", false),
            ("240.0.0.1", false),
            ("::ffff:8.8.8.8", true),
            ("::ffff:10.0.0.1", false),
            ("64:ff9b::8.8.8.8", true),
            ("64:ff9b::169.254.169.254", false),
            ("64:ff9b:1::1", false),
            ("::8.8.8.8", false),
            ("2606:4700::1111", true),
            ("2001:4860:4860::8888", true),
            ("2001:0:4136:e378::1", false),
            ("2001:db8::1", false),
            ("2002:7f00:1::", false),
            ("3fff::1", false),
            ("4000::1", false),
            ("fc00::1", false),
            ("fd12::1", false),
            ("fe80::1", false),
            ("fec0::1", false),
            ("ff0e::1", false),
        ] {
            assert_eq!(is_public(text.parse().unwrap()), expected, "{text}");
        }
    }
}
