# A scenario of tests/ in virtual machines: the machines of its topology.toml, driven by its test.py. The arguments
# `scenario` (the folder) and `packages` come by _module.args.
#
# The internet is one segment, with the addresses of crates/lacis-lab/src/plan.rs: open hosts are 198.51.100.10, .11, …
# and sites 203.0.113.10, .11, … in the order of their names; inside a site the router is .1 of 192.168.K.0/24 and hosts
# are .10, .11, …
{
  lib,
  hostPkgs,
  scenario,
  packages,
  ...
}:
let
  written = fromTOML (builtins.readFile (scenario + "/topology.toml"));
  # The services that virtual machines can run; optional hosts with others are left out.
  ours = [
    "coordinator"
    "relay"
    "lacisd"
  ];
  topology = written // {
    hosts = lib.filterAttrs (
      _: host: !(host.optional or false) || lib.subtractLists ours (host.services or [ ]) == [ ]
    ) written.hosts;
  };
  sites = topology.sites or { };
  internet = 1;
  hex = number: lib.toLower (lib.toHexString number);
  # Position of a name among others, from 0.
  position = name: names: lib.lists.findFirstIndex (other: other == name) null (lib.sort lib.lessThan names);
  siteNumber = name: position name (lib.attrNames sites);
  siteKind = name: sites.${name}.nat or "cone";
  siteHasV6 = name: sites.${name}.ipv6 or false;
  # Sites whose hosts have addresses that all the internet reaches.
  isRouted = name: lib.elem (siteKind name) [ "open" "firewall" ];
  lanPrefix =
    name:
    sites.${name}.lan
      or ((if isRouted name then "198.18" else "192.168") + ".${toString (siteNumber name + 1)}");
  lanPrefix6 = name: "2001:db8:100:${hex (siteNumber name + 1)}:";
  # miniupnpd maps nothing where its own address is one that only documentation uses.
  wanAddress =
    name:
    (if siteKind name == "port-mapping" then "44" else "203")
    + ".0.113.${toString (10 + siteNumber name)}";
  wanAddress6 = name: "2001:db8:ff:${hex (siteNumber name + 1)}::1";
  hostsIn =
    site:
    lib.attrNames (
      lib.filterAttrs (_: host: (host.site or null) == site || (host.also or null) == site) topology.hosts
    );
  place = name: site: 10 + position name (hostsIn site);
  openHosts = lib.attrNames (lib.filterAttrs (_: host: !(host ? site)) topology.hosts);
  address =
    name: host:
    if host ? site then
      "${lanPrefix host.site}.${toString (place name host.site)}"
    else
      host.address or "198.51.100.${toString (10 + position name openHosts)}";
  address6 = name: "2001:db8:0:${hex (position name (lib.attrNames topology.hosts) + 1)}::1";

  # A throw-away authority and one certificate for each host with names.
  pki =
    hostPkgs.runCommand "lacis-lab-pki" { nativeBuildInputs = [ hostPkgs.openssl ]; } ''
      mkdir $out
      cd $out
      openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 36500 \
        -subj "/CN=lacis lab" -keyout ca-key.pem -out ca.pem
      ${lib.concatStrings (
        lib.mapAttrsToList (
          name: host:
          lib.optionalString ((host.names or [ ]) != [ ]) ''
            openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=${name}" \
              -keyout ${name}-key.pem -out ${name}.csr
            openssl x509 -req -in ${name}.csr -CA ca.pem -CAkey ca-key.pem -CAcreateserial -days 36500 \
              -extfile <(echo "subjectAltName=${
                lib.concatMapStringsSep "," (dns: "DNS:${dns}") host.names
              }") -out ${name}.pem
          ''
        ) topology.hosts
      )}
      rm ca-key.pem
    '';

  # What the lab's own runner does with namespaces: crates/lacis-lab/nat has the rules.
  ruleset =
    site:
    lib.removePrefix "flush ruleset\n" (builtins.readFile (nat + "/${site.nat or "cone"}.nft"))
    + lib.optionalString (site ? mtu) (builtins.readFile (nat + "/clamp-mss.nft"))
    + lib.concatMapStrings (block: builtins.readFile (nat + "/block-${block}.nft")) (site.block or [ ]);
  nat = ../crates/lacis-lab/nat;

  # An interface with fixed addresses. Each family: the address or null, its prefix length, and routes.
  fixed =
    {
      name,
      vlan,
      mtu ? null,
      v4,
      v6,
    }:
    {
      virtualisation.interfaces.${name} = {
        inherit vlan;
        assignIP = false;
      };
      networking.interfaces.${name} =
        let
          family = it: {
            addresses = lib.optional (it.address != null) { inherit (it) address prefixLength; };
            routes = lib.optionals (it.address != null) it.routes;
          };
        in
        {
          inherit mtu;
          ipv4 = family v4;
          ipv6 = family v6;
        };
    };
  onLink = prefixLength: address: { inherit address prefixLength; };
  # An end on the internet: everybody is on the link, and what is routed lies behind the routers of its sites.
  onInternet =
    {
      name,
      mtu ? null,
      own,
      own6 ? null,
      # The site that it is the router of.
      site ? null,
    }:
    let
      others = lib.remove site (lib.attrNames sites);
      behind = wanted: route: map route (lib.filter wanted others);
    in
    fixed {
      inherit name mtu;
      vlan = internet;
      v4 = {
        address = own;
        prefixLength = 32;
        routes =
          map (onLink 24) [
            "198.51.100.0"
            "203.0.113.0"
            "44.0.113.0"
          ]
          ++ behind isRouted (other: {
            address = "${lanPrefix other}.0";
            prefixLength = 24;
            via = wanAddress other;
          });
      };
      v6 = {
        address = own6;
        prefixLength = 128;
        routes =
          map (onLink 48) [
            "2001:db8::"
            "2001:db8:ff::"
          ]
          ++ behind siteHasV6 (other: {
            address = "${lanPrefix6 other}:";
            prefixLength = 64;
            via = wanAddress6 other;
          });
      };
    };
  # An end in a site's network, with a default route by its router.
  inSite =
    {
      name,
      mtu ? null,
      site,
      last,
      metric ? null,
    }:
    let
      default = via: address: {
        inherit address via;
        prefixLength = 0;
        options = lib.optionalAttrs (metric != null) { metric = toString metric; };
      };
    in
    fixed {
      inherit name mtu;
      vlan = siteVlan site;
      v4 = {
        address = "${lanPrefix site}.${toString last}";
        prefixLength = 24;
        routes = lib.optional (last != 1) (default "${lanPrefix site}.1" "0.0.0.0");
      };
      v6 = {
        address = if siteHasV6 site then "${lanPrefix6 site}:${hex last}" else null;
        prefixLength = 64;
        routes = lib.optional (last != 1) (default "${lanPrefix6 site}:1" "::");
      };
    };
  siteVlan = name: internet + 1 + siteNumber name;

  common = {
    # QEMU's own network has a default route that would compete with the topology's.
    virtualisation.vlans = lib.mkForce [ ];
    virtualisation.qemu.networkingOptions = lib.mkForce [ ];
    networking.useDHCP = false;
    documentation.enable = false;
  };

  router =
    name: site:
    { pkgs, ... }:
    let
      # Links of virtual machines take what is too big, so a narrow uplink is one that the router sends no more to, in
      # either direction.
      mtu = site.mtu or null;
    in
    {
      imports = [
        common
        (
          if site ? behind then
            inSite {
              name = "wan";
              inherit mtu;
              site = site.behind;
              last = 100 + siteNumber name;
            }
          else
            onInternet {
              name = "wan";
              inherit mtu;
              own = wanAddress name;
              own6 = if siteHasV6 name then wanAddress6 name else null;
              site = name;
            }
        )
        (inSite {
          name = "lan";
          inherit mtu;
          site = name;
          last = 1;
        })
      ];
      boot.kernel.sysctl = {
        "net.ipv4.conf.all.forwarding" = lib.mkOverride 97 true;
        "net.ipv6.conf.all.forwarding" = lib.mkOverride 97 true;
      };
      networking.firewall.enable = false;
      networking.nftables = {
        enable = true;
        ruleset = ruleset site;
      };
      services.miniupnpd = lib.mkIf (siteKind name == "port-mapping") {
        enable = true;
        externalInterface = "wan";
        internalIPs = [ "lan" ];
        natpmp = true;
        upnp = true;
      };
      environment.systemPackages = [ pkgs.conntrack-tools ];
    };

  machine =
    name: host:
    { pkgs, lib, ... }:
    let
      services = host.services or [ ];
      unknown = lib.subtractLists ours services;
    in
    {
      imports = [
        ../nixos-modules
        common
        (
          if host ? site then
            inSite {
              name = "eth0";
              inherit (host) site;
              last = place name host.site;
            }
          else
            onInternet {
              name = "eth0";
              own = address name host;
              own6 = if host.ipv6 or false then address6 name else null;
            }
        )
        (lib.optionalAttrs (host ? also) (inSite {
          name = "eth1";
          site = host.also;
          last = place name host.also;
          metric = 2048;
        }))
      ];
      # Only the topology's public names; machines of the mesh find each other by MagicDNS.
      networking.extraHosts = lib.mkForce (
        lib.concatStrings (
          lib.mapAttrsToList (
            other: declared:
            lib.concatMapStrings (
              dns:
              "${address other declared} ${dns}\n"
              + lib.optionalString (declared.ipv6 or false) "${address6 other} ${dns}\n"
            ) (declared.names or [ ])
          ) topology.hosts
        )
      );
      networking.firewall.enable = false;
      security.pki.certificateFiles = [ "${pki}/ca.pem" ];
      environment.systemPackages =
        with pkgs;
        [
          python3
          dig
          curl
        ]
        ++ map (
          program:
          pkgs.${
            {
              # As Debian has it: with DNS over HTTPS.
              unbound = "unbound-full";
              wg = "wireguard-tools";
              faketime = "libfaketime";
            }
            .${program} or program
          }
        ) (topology.needs or [ ])
        ++ lib.optional (host.attacks or false) packages.lacis-lab;
      environment.etc = lib.mkMerge [
        (lib.mapAttrs' (path: text: lib.nameValuePair (lib.removePrefix "/etc/" path) { inherit text; }) (
          host.files or { }
        ))
        (lib.mkIf ((host.names or [ ]) != [ ]) {
          "lacis/tls/cert.pem".source = "${pki}/${name}.pem";
          "lacis/tls/key.pem" = {
            source = "${pki}/${name}-key.pem";
            mode = "0440";
            group = "lacis-tls";
          };
        })
      ];
      users.groups.lacis-tls = { };
      systemd.services = lib.genAttrs (map (service: "lacis-${service}") (
        lib.intersectLists services [
          "coordinator"
          "relay"
        ]
      )) (_: { serviceConfig.SupplementaryGroups = [ "lacis-tls" ]; });
      services.lacis = lib.throwIf (unknown != [ ])
        "hosts.${name}: virtual machines do not run ${toString unknown} yet"
        {
          coordinator = {
            enable = lib.elem "coordinator" services;
            package = packages.lacis-coordinator;
            settings = host.coordinator or { };
          };
          relay = {
            enable = lib.elem "relay" services;
            package = packages.lacis-relay;
            settings = host.relay or { };
          };
          client = {
            enable = lib.elem "lacisd" services;
            package = packages.lacis;
          };
        };
    };
in
{
  name = "lacis-${baseNameOf scenario}";
  meta.description = topology.description;
  # The scripts have no types, and may use names of common.py for something else.
  skipTypeCheck = true;
  skipLint = true;
  globalTimeout = (topology.timeout or 300) + 300;
  nodes = lib.mapAttrs router sites // lib.mapAttrs machine topology.hosts;
  testScript =
    "import json\n\nexpect = json.loads(${builtins.toJSON (builtins.toJSON (topology.expect or null))})\n\n"
    + builtins.readFile ../tests/common.py
    + "\n"
    + builtins.readFile (scenario + "/test.py");
}
