# A scenario of tests/ in virtual machines: the machines of its topology.toml, driven by its test.py. The arguments
# `scenario` (the folder) and `packages` come by _module.args.
#
# The internet is one segment: open hosts are 198.51.100.10, .11, … and sites 203.0.113.10, .11, … in the order of their
# names; inside a site the router is .1 of 192.168.K.0/24 and hosts are .10, .11, … (as in crates/lacis-lab/src/plan.rs).
{
  lib,
  hostPkgs,
  scenario,
  packages,
  ...
}:
let
  topology = fromTOML (builtins.readFile (scenario + "/topology.toml"));
  sites = topology.sites or { };
  internet = 1;
  # Position of a name among others, from 0.
  position = name: names: lib.lists.findFirstIndex (other: other == name) null (lib.sort lib.lessThan names);
  siteNumber = name: position name (lib.attrNames sites);
  lanPrefix =
    name: sites.${name}.lan or "192.168.${toString (siteNumber name + 1)}";
  hostsIn = site: lib.attrNames (lib.filterAttrs (_: host: (host.site or null) == site) topology.hosts);
  address =
    name: host:
    if host ? site then
      "${lanPrefix host.site}.${toString (10 + position name (hostsIn host.site))}"
    else
      host.address or "198.51.100.${toString (10 + position name (hostsIn null))}";

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
    builtins.replaceStrings
      [ "flush ruleset\n" "# blocked\n" ]
      [
        ""
        (lib.concatMapStrings (block: builtins.readFile (nat + "/block-${block}.nft")) (site.block or [ ]))
      ]
      (builtins.readFile (nat + "/${site.nat or "cone"}.nft"));
  nat = ../crates/lacis-lab/nat;

  fixed = interface: addresses: {
    virtualisation.interfaces.${interface.name} = {
      inherit (interface) vlan;
      assignIP = false;
    };
    networking.interfaces.${interface.name}.ipv4 = {
      inherit addresses;
      routes = interface.routes or [ ];
    };
  };
  onInternet =
    name: own:
    fixed
      {
        inherit name;
        vlan = internet;
        routes =
          map
            (prefix: {
              address = prefix;
              prefixLength = 24;
            })
            [
              "198.51.100.0"
              "203.0.113.0"
            ];
      }
      [
        {
          address = own;
          prefixLength = 32;
        }
      ];
  siteVlan = name: internet + 1 + siteNumber name;

  common = {
    # QEMU's own network has a default route that would compete with the topology's.
    virtualisation.vlans = lib.mkForce [ ];
    virtualisation.qemu.networkingOptions = lib.mkForce [ ];
    networking.useDHCP = false;
    documentation.enable = false;
  };

  router = name: site: {
    imports = [
      common
      (onInternet "wan" "203.0.113.${toString (10 + siteNumber name)}")
      (fixed
        {
          name = "lan";
          vlan = siteVlan name;
        }
        [
          {
            address = "${lanPrefix name}.1";
            prefixLength = 24;
          }
        ]
      )
    ];
    boot.kernel.sysctl."net.ipv4.conf.all.forwarding" = lib.mkOverride 97 true;
    networking.firewall.enable = false;
    networking.nftables = {
      enable = true;
      ruleset = ruleset (
        lib.throwIf (site ? behind || (site.ipv6 or false))
          "sites.${name}: `behind` and `ipv6` are not made of virtual machines yet"
          site
      );
    };
  };

  machine =
    name: host:
    { pkgs, lib, ... }:
    let
      own = address name host;
      services = host.services or [ ];
      unknown = lib.subtractLists [ "coordinator" "relay" "lacisd" ] services;
    in
    {
      imports = [
        ../nixos-modules
        common
        (
          if host ? site then
            fixed
              {
                name = "eth0";
                vlan = siteVlan host.site;
              }
              [
                {
                  address = own;
                  prefixLength = 24;
                }
              ]
          else
            onInternet "eth0" own
        )
      ];
      networking.defaultGateway = lib.mkIf (host ? site) {
        address = "${lanPrefix host.site}.1";
        interface = "eth0";
      };
      # Only the topology's public names; machines of the mesh find each other by MagicDNS.
      networking.extraHosts = lib.mkForce (
        lib.concatStrings (
          lib.mapAttrsToList (
            other: declared: lib.concatMapStrings (dns: "${address other declared} ${dns}\n") (declared.names or [ ])
          ) topology.hosts
        )
      );
      networking.firewall.enable = false;
      security.pki.certificateFiles = [ "${pki}/ca.pem" ];
      environment.systemPackages = with pkgs; [
        python3
        dig
        curl
      ];
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
  globalTimeout = (topology.timeout or 300) + 300;
  nodes = lib.mapAttrs router sites // lib.mapAttrs machine topology.hosts;
  testScript = builtins.readFile ../tests/common.py + "\n" + builtins.readFile (scenario + "/test.py");
}
