# Tests of the NixOS modules that need no machine: hosts are evaluated and looked at, those of the documents' snippets
# among them. The result can be built where all is as it should be; building it lets the programs themselves check the
# configuration files that come of it.
{
  nixpkgs,
  pkgs,
  # Names of the scenarios that are offered as virtual machines.
  scenarios,
}:
let
  inherit (pkgs) lib;
  evaluate =
    pkgs: module:
    (import (nixpkgs + "/nixos/lib/eval-config.nix") {
      inherit lib pkgs;
      system = null;
      specialArgs.lacis.nixosModules.default = ../nixos-modules;
      modules = [
        ../nixos-modules
        common
        module
      ];
    }).config;
  host = evaluate pkgs;
  # What any host has, and sops-nix, which the documents take for granted.
  common = {
    options.sops.secrets = lib.mkOption {
      default.lacis.path = "/run/secrets/lacis";
    };
    config = {
      fileSystems."/" = {
        device = "/dev/vda";
        fsType = "ext4";
      };
      boot.loader.grub.enable = lib.mkDefault false;
      system.stateVersion = lib.trivial.release;
    };
  };
  complaintsOf = config: map (it: it.message) (lib.filter (it: !it.assertion) config.assertions) ++ config.warnings;
  # Only ours, which is quicker.
  ours = lib.filter (lib.hasPrefix "services.lacis");
  filesOf = config: lib.filter (lib.hasPrefix "lacis/") (lib.attrNames config.environment.etc);

  # A snippet about the coordinator may leave out what another one has.
  documents = lib.listToAttrs (
    map (
      { name, text, module }:
      lib.nameValuePair name (host {
        imports = [ module ];
        services.lacis.coordinator = lib.mkIf (has "services.lacis.coordinator" text) {
          enable = lib.mkDefault true;
          settings.server_url = lib.mkDefault "https://mesh.example.org";
          settings.tailnets.lab.domain = lib.mkDefault "lab.example.org";
        };
      })
    ) (import ./snippets.nix)
  );

  coordinator = {
    enable = true;
    openFirewall = true;
    settings = {
      server_url = "https://mesh.example.org";
      tailnets.lab.domain = "lab.example.org";
    };
  };
  client = {
    enable = true;
    loginServer = "https://mesh.example.org";
    authKeyFile = "/run/secrets/lacis";
  };
  serverWith =
    policy:
    host {
      services.lacis.coordinator = lib.recursiveUpdate coordinator {
        settings = {
          listen = [
            "127.0.0.1:8080"
            "192.0.2.1:443"
            "[2001:db8::1]:443"
          ];
          embedded_relay.stun_listen = [ "0.0.0.0:3479" ];
          tailnets.lab.policy.path = policy;
          tailnets.home = {
            domain = "home.example.org";
            policy.path = "/etc/lacis/home.hujson";
          };
        };
      };
      services.lacis.relay = {
        enable = true;
        openFirewall = true;
        settings = {
          listen = "[::]:8443";
          stun = [ ];
          admission = "open";
        };
      };
    };
  server = serverWith ../examples/policy/laboratory.hujson;
  serverUnit = server.systemd.services.lacis-coordinator;
  otherUnit = (serverWith (pkgs.writeText "policy.hujson" "{}")).systemd.services.lacis-coordinator;
  behindProxy = host {
    services.lacis.coordinator = coordinator;
    services.lacis.client = client // {
      tags = [ "tag:server" ];
    };
    networking.proxy.default = "http://proxy.example.org:3128";
  };
  signIn = behindProxy.systemd.services.lacis-up.serviceConfig;
  has = lib.hasInfix;

  # What is right, each in words.
  facts = {
    "scenarios whose guests are optional are offered without them" = lib.all (name: lib.elem name scenarios) [
      "exit-node"
      "node-life"
      "subnet-failover"
      "subnet-router"
    ];
    "the documents' proxies say whose requests they pass on, and can be reached" = lib.all (
      config:
      let
        hosts = lib.attrValues config.services.nginx.virtualHosts;
        locations = lib.concatMap (it: lib.attrValues it.locations) hosts;
      in
      !config.services.nginx.enable
      || (
        lib.all (it: it.proxyPass == null || it.recommendedProxySettings) locations
        && lib.all (port: lib.elem port config.networking.firewall.allowedTCPPorts) [
          80
          443
        ]
      )
    ) (lib.attrValues documents);
    "openFirewall opens the ports of the settings, and none of loopback" =
      server.networking.firewall.allowedTCPPorts == [
        443
        8443
      ]
      && server.networking.firewall.allowedUDPPorts == [ 3479 ];
    "a coordinator behind a proxy opens STUN alone, and says so" =
      behindProxy.networking.firewall.allowedTCPPorts == [ ]
      && behindProxy.networking.firewall.allowedUDPPorts == [ 3478 ]
      && lib.any (has "opens no TCP port") behindProxy.warnings;
    "a policy that comes with the system has a path that stays" =
      filesOf server == [
        "lacis/coordinator.yaml"
        "lacis/policy/lab.hujson"
        "lacis/relay.yaml"
      ];
    "another policy reloads the coordinator and does not restart it" =
      otherUnit.restartTriggers == serverUnit.restartTriggers
      && otherUnit.reloadTriggers != serverUnit.reloadTriggers;
    "the unit that signs in leaves alone what is not declared" =
      has "--if-needed" signIn.ExecStart
      && has "--advertise-tags=tag:server" signIn.ExecStart
      && !lib.any (flag: has flag signIn.ExecStart) [
        "--reset"
        "--operator"
        "--shields-up"
      ];
    "the key's file may go once the machine is in" = signIn.SetCredential == [ "auth-key:\\n" ];
    "the daemon is given the host's proxy" =
      lib.getAttrs [
        "https_proxy"
        "no_proxy"
      ] behindProxy.systemd.services.lacisd.environment
      == {
        https_proxy = "http://proxy.example.org:3128";
        no_proxy = "127.0.0.1,localhost";
      };
  };

  # What is wrong is refused or warned of, in these words.
  wrong = {
    "has a default route" = {
      services.lacis.client = client // {
        advertiseRoutes = [ "0.0.0.0/0" ];
      };
    };
    "services.tailscale use the same" = {
      services.lacis.client = client;
      services.tailscale.enable = true;
    };
    "the strict reverse-path filter" = {
      services.lacis.client = client // {
        exitNode = "gate";
        netfilterMode = "off";
      };
    };
    "unless your own rules" = {
      services.lacis.client = client // {
        acceptRoutes = true;
        netfilterMode = "nodivert";
      };
    };
    "port is not known beforehand" = {
      services.lacis.client = client // {
        openFirewall = true;
        port = 0;
      };
    };
    "the same TCP port and UDP port (STUN)" = {
      services.lacis.coordinator = lib.recursiveUpdate coordinator { settings.listen = [ "0.0.0.0:443" ]; };
      services.lacis.relay = {
        enable = true;
        settings.admission = "open";
      };
    };
    "are not checked" = {
      _module.args.pkgs = lib.mkForce foreign;
      services.lacis.coordinator = coordinator;
    };
  };
  # Built on a platform that cannot run the programs.
  foreign = pkgs // {
    stdenv = pkgs.stdenv // {
      buildPlatform = pkgs.stdenv.buildPlatform // {
        canExecute = _: false;
      };
    };
  };
  # Values that no option takes, and some that it does.
  types = (import ../nixos-modules/addresses.nix { inherit lib; }).types;
  refusedValues = {
    network = [
      "192.168.1.5/24"
      "999.1.2.3/99"
      "10.0.0.0/33"
      "10.0.0.0"
      "2001:db8::1/64"
      "2001:db8:::/64"
      "2001:db8::/129"
      "1:2:3:4:5:6:7/16"
    ];
    endpoint = [
      "198.51.100.7"
      "198.51.100.256:1"
      "198.51.100.7:65536"
      "[2001:db8::g]:1"
      "2001:db8::7:41641"
    ];
    listener = [
      "localhost:80"
      "0.0.0.0"
      "::1:443"
      "0.0.0.0:99999"
    ];
  };
  takenValues = {
    network = [
      "192.168.1.0/24"
      "10.0.0.1/32"
      "0.0.0.0/0"
      "::/0"
      "2001:db8:1::/48"
      "fd7a:115c:a1e0:b1a:0:7:10.0.0.0/120"
    ];
    endpoint = [
      "198.51.100.7:41641"
      "[2001:db8::7]:41641"
    ];
    listener = [
      "0.0.0.0:443"
      "[::]:443"
      "[fe80::1%2]:443"
    ];
  };
  values =
    verdict: all:
    lib.concatLists (
      lib.mapAttrsToList (
        type:
        lib.concatMap (
          value: lib.optional (types.${type}.check value != verdict) "the type ${type}: ${value}: not ${lib.boolToString verdict}"
        )
      ) all
    );

  failures =
    lib.concatLists (lib.mapAttrsToList (name: config: map (said: "${name}: ${said}") (complaintsOf config)) documents)
    ++ lib.attrNames (lib.filterAttrs (_: holds: !holds) facts)
    ++ lib.concatLists (
      lib.mapAttrsToList (
        words: module:
        let
          said = ours (complaintsOf (host module));
        in
        lib.optional (!lib.any (has words) said) "nothing says \"${words}\", but: ${toString said}"
      ) wrong
    )
    ++ values false refusedValues
    ++ values true takenValues;
  files = lib.concatMap (config: map (file: config.environment.etc.${file}.source) (filesOf config)) (
    [ server ] ++ lib.attrValues documents
  );
in
lib.throwIf (failures != [ ]) "\n${lib.concatMapStrings (failure: "- ${failure}\n") failures}" (
  pkgs.runCommand "lacis-module-tests" { inherit files; } ''
    for file in $files; do [ -s "$file" ]; done
    touch $out
  ''
)
